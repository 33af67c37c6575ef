"""A DPOTrainer that reaches TRL's losses with less arithmetic; data, batches, optimizer and log stay TRL's
own.

Of a pair it computes the prompt once instead of twice, no padding, and the output head (50,257 columns in
DialoGPT) only where a token of an answer is predicted. Imported only by the functions that train, because it
needs TRL at once.
"""

import inspect
from collections import defaultdict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers.activations import NewGELUActivation
from trl import DPOTrainer

from dpo_helpers.data.prompt import SIDES
from dpo_helpers.judge.scores import score_encoded
from dpo_helpers.machine import PACK_TOKENS
from dpo_helpers.model.answer import use_role

SAME_LOG_PROB = (
    0.03  # nats a token: half precision stays below, a mask or a position that a model ignores does not
)


class Pack(NamedTuple):
    """Pairs that lie end to end in one row; token i of their answers is `targets[i]`, of sequence
    `owners[i]` (chosen first).
    """

    # input_ids, position_ids (1, tokens); attention_mask (1, 1, tokens, tokens); logits_to_keep (answer
    # tokens,)
    model_inputs: dict
    targets: torch.Tensor
    owners: torch.Tensor
    pairs: int


def pack_pairs(input_ids, attention_mask, completion_mask, dtype=torch.float32) -> Pack:
    """Turn TRL's padded batch (2 * pairs, tokens), chosen rows first, into one row of prompt, chosen and
    rejected tokens.

    A rejected row loses its prompt: the answer looks at the chosen row's instead. The last token of a row
    predicts nothing. The mask is added to the attention scores, in the model's `dtype`: a mask of booleans
    would mean something else to some models.
    """
    pairs = len(input_ids) // 2
    answers, predicted = completion_mask[:, :-1].bool(), completion_mask[:, 1:].bool()
    kept = attention_mask[:, 1:].bool()
    kept[pairs:] &= answers[pairs:]
    row, position = kept.nonzero(as_tuple=True)
    pair, side, is_prompt = row % pairs, row // pairs, ~answers[kept]
    visible = (
        (pair[:, None] == pair) & (position[:, None] >= position) & (is_prompt | (side[:, None] == side))
    )
    place = kept.flatten().cumsum(0).view_as(kept) - 1
    place[pairs:] = torch.where(
        kept[pairs:], place[pairs:], place[:pairs]
    )  # the prompt's last token predicts both answers
    model_inputs = {
        "input_ids": input_ids[:, :-1][kept][None],
        "attention_mask": torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(
            ~visible, -torch.inf
        )[None, None],
        "position_ids": position[None],
        "logits_to_keep": place[predicted],
    }
    return Pack(model_inputs, input_ids[:, 1:][predicted], predicted.nonzero()[:, 0], pairs)


def split_batch(inputs: dict, max_length: int, pack_tokens: int, dtype):
    """Cut TRL's padded batch to `max_length`, as TRL does, and yield it a pack of whole pairs at a time."""
    columns = [inputs[name][:, :max_length] for name in ("input_ids", "attention_mask", "completion_mask")]
    pairs, tokens = len(columns[0]) // 2, columns[0].shape[1]
    for picked in torch.arange(pairs).split(max(1, pack_tokens // (2 * tokens))):
        yield pack_pairs(*(column[torch.cat([picked, picked + pairs])] for column in columns), dtype)


def score_pack(model, pack: Pack, sums: list | None = None):
    """Return the answers' log-probs (2, pairs); for the log, append to `sums` what each side's tokens add up
    to (2, 4).

    These are the number of tokens, their entropy, their mean logit, and how many were the likeliest.
    """
    logits = model(**pack.model_inputs, use_cache=False).logits[0]  # (answer tokens, vocabulary)
    log_probs = F.log_softmax(logits.float(), dim=-1)
    of_tokens = log_probs.gather(1, pack.targets[:, None])[:, 0]
    if sums is not None:
        with torch.no_grad():
            entropy = -log_probs.exp().mul_(log_probs).sum(-1)
            likeliest = of_tokens == log_probs.amax(-1)
            figures = torch.stack(
                [torch.ones_like(entropy), entropy, logits.mean(-1).float(), likeliest.float()], dim=1
            )
            sums.append(figures.new_zeros(2, 4).index_add(0, pack.owners // pack.pairs, figures))
    return of_tokens.new_zeros(2 * pack.pairs).index_add(0, pack.owners, of_tokens).view(2, -1)


def use_fused_gelu(model) -> None:
    """Put PyTorch's one-kernel tanh GELU in the place of GPT-2's, which is the same formula in nine steps."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))


class FastDPOTrainer(DPOTrainer):
    """TRL's trainer for the losses `sigmoid` and `sigmoid+sft` and a PeftModel.

    `is_exact` is False where the model needs the stock computation.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.measured = {True: defaultdict(list), False: defaultdict(list)}  # in training, in evaluation
        use_fused_gelu(self.model)
        self.is_exact = self._agrees_with_stock()
        if not self.is_exact:
            print(
                "このモデルでは速い計算が標準の計算と一致しないので、TRL の標準の計算で学習します。"
                "時間は長くなります。"
            )

    def _agrees_with_stock(self) -> bool:
        """Compare the log-probs of the two longest rows with those of an ordinary forward pass."""
        if not {"position_ids", "logits_to_keep"} <= set(
            inspect.signature(self.model.get_base_model().forward).parameters
        ):
            return False
        data = self.train_dataset.select_columns(["prompt_ids", *(f"{side}_ids" for side in SIDES)])
        rows = sorted(data, key=lambda row: sum(map(len, row.values())))[-2:]
        whole = [
            ((row["prompt_ids"] + row[f"{side}_ids"])[: self.args.max_length], len(row["prompt_ids"]))
            for side in SIDES
            for row in rows
        ]
        expected = score_encoded(self.model, self.processing_class, whole, len(whole))
        with torch.no_grad():
            found = self._score(self.model, self.data_collator(rows)).flatten().tolist()
        return all(
            abs(a - b) < SAME_LOG_PROB * len(ids)
            for a, b, (ids, _) in zip(found, expected, whole, strict=True)
        )

    def _score(self, model, inputs, sums: list | None = None):
        device = self.accelerator.device
        inputs = {name: column.to(device) for name, column in inputs.items()}
        packs = split_batch(inputs, self.args.max_length, PACK_TOKENS[device.type], self.model.dtype)
        return torch.cat([score_pack(model, pack, sums) for pack in packs], dim=1)

    def _score_reference(self, inputs):
        with (
            torch.no_grad(),
            self.accelerator.autocast(),
            use_role(self.accelerator.unwrap_model(self.model), "reference"),
        ):
            return self._score(self.model, inputs)

    def _add_references(self, dataset):
        """Return the rows with TRL's own columns of reference log-probs: what is read again need not be
        computed again.
        """
        if not self.is_exact or "ref_chosen_logps" in dataset.column_names:
            return dataset
        size = self.args.per_device_eval_batch_size
        batches = [
            [dataset[i] for i in range(start, min(start + size, len(dataset)))]
            for start in range(0, len(dataset), size)
        ]
        scores = torch.cat(
            [self._score_reference(self.data_collator(batch)) for batch in batches], dim=1
        ).tolist()
        for side, column in zip(SIDES, scores, strict=True):
            dataset = dataset.add_column(f"ref_{side}_logps", column)
        return dataset

    def get_train_dataloader(self):
        if self.args.num_train_epochs > 1:
            self.train_dataset = self._add_references(self.train_dataset)
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset=None):
        if eval_dataset is None or eval_dataset is self.eval_dataset:
            eval_dataset = self.eval_dataset = self._add_references(self.eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """-log sigmoid(beta * (log-ratio of chosen - log-ratio of rejected)), the mean over pairs (Rafailov
        et al. 2023, eq. 7); with `sft` among the losses, plus the mean over pairs of the chosen answer's -log
        p a token.
        """
        if not self.is_exact or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if "ref_chosen_logps" in inputs:
            reference = torch.stack([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        else:
            reference = self._score_reference(inputs)
        sums = []
        policy = self._score(model, inputs, sums)
        rewards = self.args.beta * (policy - reference)  # (2, pairs)
        preference, extra = -F.logsigmoid(rewards[0] - rewards[1]).mean(), {}
        weights = dict(zip(self.loss_types, self.loss_weights, strict=True))
        loss = weights["sigmoid"] * preference
        if "sft" in weights:
            # by pairs and not by tokens: a micro-batch of any size then gives the loss of the seed's 1 x 4
            tokens = inputs["completion_mask"][: len(policy[0]), 1 : self.args.max_length].sum(1).clamp(min=1)
            sft = -(policy[0] / tokens.to(policy.device)).mean()
            loss = loss + weights["sft"] * sft
            extra = {
                "loss": preference.detach(),
                "sft_loss": sft.detach(),
            }  # "loss" is always the preference term
        self._measure(inputs, policy.detach(), rewards.detach(), sum(sums), extra)
        return loss

    def _measure(self, inputs, policy, rewards, sums, extra: dict) -> None:
        """Note for the log what TRL notes, under its names."""
        tokens, entropy, logit, likeliest = sums.T
        tokens = tokens.clamp(min=1)  # rows that were cut before their answers
        figures = {
            "entropy": entropy.sum() / tokens.sum(),
            "logits/chosen": logit[0] / tokens[0],
            "logits/rejected": logit[1] / tokens[1],
            "mean_token_accuracy": likeliest[0] / tokens[0],
            "rewards/chosen": rewards[0].mean(),
            "rewards/rejected": rewards[1].mean(),
            "rewards/accuracies": (rewards[0] > rewards[1]).float().mean(),
            "rewards/margins": (rewards[0] - rewards[1]).mean(),
            "logps/chosen": policy[0].mean(),
            "logps/rejected": policy[1].mean(),
            **extra,
        }
        # one gathering and one wait for the device
        values = self.accelerator.gather(torch.stack(list(figures.values()))).view(-1, len(figures)).mean(0)
        measured = self.measured[self.model.training]
        for name, value in zip(figures, values.tolist(), strict=True):
            measured[name].append(value)
        if self.model.training:
            self._total_train_tokens += self.accelerator.gather(inputs["attention_mask"].sum()).sum().item()
        measured["num_tokens"] = [self._total_train_tokens]

    def log(self, logs, start_time=None):
        measured = self.measured[self.model.training]
        prefix = "" if self.model.training else "eval_"
        logs.update({prefix + name: sum(values) / len(values) for name, values in measured.items()})
        measured.clear()
        super().log(logs, start_time)
