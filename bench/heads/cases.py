"""The heads that are measured: sizes of language models, a table for each device."""

from dataclasses import dataclass

from bench.common.precision import DTYPES


@dataclass(frozen=True)
class Head:
    rows: int
    features: int
    classes: int
    dtype: str = "fp32"

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.features}-{self.classes}-{self.dtype}"

    @property
    def flops(self) -> int:
        return 6 * self.rows * self.features * self.classes

    @property
    def bytes(self) -> dict[str, int]:
        size = DTYPES[self.dtype].itemsize
        gradients = (self.rows + self.classes) * self.features * size
        return {"logits": self.rows * self.classes * size, "gradients": gradients}


# In both of the types that models are trained in; on CUDA, the size of which others publish figures
# and four times as many rows.
HEADS = {
    "cpu": [Head(2048, 768, 32000), Head(2048, 768, 32000, "bf16")],
    "cuda": [Head(4096, 4096, 128256, "bf16"), Head(16384, 4096, 128256, "bf16")],
}
# What memory is measured over: the vocabularies of Llama 2, Llama 3 and Gemma.
VOCABULARIES = (32000, 128256, 256000)
TALL = {"cpu": Head(2048, 768, 0, "bf16"), "cuda": Head(16384, 4096, 0, "bf16")}
QUICK = [Head(64, 16, 500)]
QUICK_VOCABULARIES = (20000, 40000)
