"""What several tests share: the tokenizers of real models, tiny models, runs that are closed afterwards."""

import lzma
from pathlib import Path

import pytest

FIXTURES = Path(__file__).parent / "fixtures"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Keep every library off the network; the embedded model is the machine's own, which the demo made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("huggingface")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="session")
def rows():
    from dpo_helpers.data.generate import generate_preferences

    return generate_preferences(1000, seed=42)


def open_tokenizer(name: str, end: str):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    text = lzma.decompress((FIXTURES / f"{name}_tokenizer.json.xz").read_bytes()).decode()
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text), bos_token=end, eos_token=end, pad_token=end
    )


@pytest.fixture(scope="session")
def gpt2_tokenizer():
    return open_tokenizer("gpt2", "<|endoftext|>")


@pytest.fixture(scope="session")
def smollm2_tokenizer():
    return open_tokenizer("smollm2", "<|im_end|>")


@pytest.fixture(scope="session")
def embedded_folder():
    from dpo_helpers.model.embedded import make_embedded_model

    return make_embedded_model()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory, embedded_folder):
    """Folders of two random two-layer models with the embedded tokenizer: GPT-2 (Conv1D), Llama (Linear)."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(embedded_folder)
    ids = {
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "vocab_size": len(tokenizer),
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    models = {
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=256, **ids)),
        "llama": LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, **ids
            )
        ),
    }
    folders = {}
    for name, model in models.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture
def drive(tmp_path, monkeypatch):
    """A folder that stands for Google Drive and fails as its attribute `fault` says."""
    from faulty_drive import Drive

    return Drive(tmp_path / "drive", monkeypatch)


@pytest.fixture
def colab(tmp_path, monkeypatch):
    """A kernel of Colab: google.colab is imported, Drive is not yet mounted, the working folder is empty."""
    from fake_colab import FakeColab

    from dpo_helpers import colab as colab_module

    fake = FakeColab(tmp_path / "colab", monkeypatch)
    monkeypatch.setattr(colab_module, "DRIVE_ROOT", fake.mount_point)
    (tmp_path / "content").mkdir()
    monkeypatch.chdir(tmp_path / "content")
    return fake


@pytest.fixture
def start_run(tmp_path):
    """A function that opens a run on the CPU and checks its rows; all of them are closed after the test.

    For tiny_run's functions, `config` and `rows` (training, held-out) are noted on the run.
    """
    from dpo_helpers.keep.run import open_run
    from dpo_helpers.machine import find_machine

    opened = []

    def start(config, train_rows, held_out_rows, folder=tmp_path / "run", **options):
        run = open_run(config, folder, find_machine("cpu"), **options)
        opened.append(run)
        run.check_rows(train_rows, held_out_rows)
        run.rows = train_rows, held_out_rows
        return run

    yield start
    for run in opened:
        run.close()


@pytest.fixture(scope="session")
def undisturbed(tiny_models, rows, tmp_path_factory):
    """(run, trainer) of a tiny training with a warm-up that nothing disturbs, logged at every step, saved."""
    from tiny_run import make_config, save, train

    from dpo_helpers.keep.run import open_run
    from dpo_helpers.machine import find_machine

    config = make_config(tiny_models, logging_steps=1)
    run = open_run(config, tmp_path_factory.mktemp("undisturbed") / "run", find_machine("cpu"))
    run.rows = rows[:32], rows[32:40]
    run.check_rows(*run.rows)
    trainer = train(run)
    save(run, trainer)
    run.close()
    return run, trainer


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The folder and metrics of a small real run: embedded model, 150 rows, with a warm-up."""
    from dpo_helpers.__main__ import train
    from dpo_helpers.config import RunConfig

    folder = tmp_path_factory.mktemp("runs") / "run"
    config = RunConfig(
        model_name="embedded",
        num_samples=150,
        learning_rate=2e-3,
        lora_scale=2.0,
        sft_epochs=1,
        sft_learning_rate=5e-4,
        checkpoint_steps=10,
    )
    return folder, train(config, folder, device="cpu")


@pytest.fixture
def kill_at(monkeypatch):
    """A function that makes the training of one stage die in the middle of a step."""
    from tiny_run import Killed
    from transformers import Trainer

    def arm(stage, step):
        original = Trainer.training_step

        def training_step(self, *arguments, **options):
            if self.args.output_dir.endswith(stage) and self.state.global_step == step:
                monkeypatch.setattr(Trainer, "training_step", original)
                raise Killed
            return original(self, *arguments, **options)

        monkeypatch.setattr(Trainer, "training_step", training_step)

    return arm
