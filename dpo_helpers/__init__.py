"""Small functions behind the two notebooks: DPO with LoRA, from an empty machine to a saved model. Import
the modules by name.
"""
