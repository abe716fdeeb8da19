"""A language model of Transformers under the Trainer: its head fused with one line, the same curve.

The Trainer computes the loss as it always does, by the model's own function, over several
micro-batches; with fuse_head no logits exist in training, and the evaluation has them. The model
learns which letter follows the others, and then writes. Run it with
`python examples/transformers_trainer.py` (it needs transformers and accelerate; nothing is
downloaded).
"""

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from fused_ce.integrations.transformers import explain_head, fuse_head

TEXT = "the cat sat on the mat and the cat ran to the mat where the cat sat and the rat sat on it. "
LETTERS = sorted(set(TEXT))
LENGTH, STEPS = 24, 20


def tokens_of(text: str) -> torch.Tensor:
    return torch.tensor([LETTERS.index(letter) for letter in text])


def model() -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=len(LETTERS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=0,
        eos_token_id=LETTERS.index("."),
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def train(model: transformers.PreTrainedModel, folder: str) -> tuple[list[float], float]:
    """The curve of the training loss, and the loss of an evaluation in the end."""
    text = tokens_of(TEXT * 2)
    starts = range(len(TEXT))
    data = [{"input_ids": x, "labels": x} for x in (text[i : i + LENGTH] for i in starts)]
    arguments = transformers.TrainingArguments(
        folder,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data[:16])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    curve = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return curve, trainer.evaluate()["eval_loss"]


def main() -> None:
    transformers.logging.set_verbosity_error()
    fused = fuse_head(model())  # the line
    with tempfile.TemporaryDirectory() as folder:
        curve, evaluated = train(model(), folder)
        fused_curve, fused_evaluated = train(fused, folder)

    print(" step     stock  fuse_head")
    for step in (0, 4, 9, 14, STEPS - 1):
        print(f"{step + 1:>5} {curve[step]:>9.4f} {fused_curve[step]:>10.4f}")
    print(f" eval {evaluated:>9.4f} {fused_evaluated:>10.4f}")
    pairs = [*zip(curve, fused_curve, strict=True), (evaluated, fused_evaluated)]
    print(f"largest relative difference: {max(abs(a - b) / a for a, b in pairs):.1e}")
    print(explain_head(fused))
    written = fused.generate(tokens_of("the ")[None], max_new_tokens=12, do_sample=False)
    print(repr("".join(LETTERS[token] for token in written[0])))


if __name__ == "__main__":
    main()
