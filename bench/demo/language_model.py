"""A next-word model of the Python manual: text -> vocabulary -> windows -> a small GRU.

The text ships with every Python (`pydoc_data.topics`), so nothing is downloaded. Each topic is a
document cut into windows; the tail of its last window is padding, which the loss must ignore.
A word-level vocabulary makes the head wide, and a wide head is where cross entropy costs most.
"""

import re
from collections import Counter
from collections.abc import Iterable
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

from bench.demo.training import Task, shuffled_batches

PAD, UNKNOWN = 0, 1
IGNORED = -100
WINDOW = 64
WIDTH = 128
BATCH = 32

# Lines that underline a heading are one repeated sign: trivial to predict, nothing to learn.
RULES = re.compile(r"(?m)^\s*([^\w\s])\1{2,}\s*$")
WORDS = re.compile(r"[^\W\d]+|\d+|[^\w\s]")


def words_of(text: str) -> list[str]:
    return WORDS.findall(RULES.sub("", text))


def build_vocabulary(documents: Iterable[list[str]]) -> dict[str, int]:
    """Every word seen twice gets an index; a word seen once could not be learnt, only recalled."""
    counts = Counter(word for document in documents for word in document)
    kept = sorted(word for word, count in counts.items() if count > 1)
    return {word: index for index, word in enumerate(kept, start=UNKNOWN + 1)}


def cut_windows(
    documents: Iterable[list[str]], vocabulary: dict[str, int]
) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both [windows, WINDOW]; a target is the word after its input."""
    inputs, targets = [], []
    for document in documents:
        indices = [vocabulary.get(word, UNKNOWN) for word in document]
        for start in range(0, len(indices) - 1, WINDOW):
            piece = indices[start : start + WINDOW + 1]
            missing = WINDOW + 1 - len(piece)
            inputs.append(piece[:-1] + [PAD] * missing)
            targets.append(piece[1:] + [IGNORED] * missing)
    return torch.tensor(inputs), torch.tensor(targets)


class WordModel(nn.Module):
    # A GRU and not a transformer: within 150 steps of plain SGD a transformer of this size turns
    # one ulp of the logits into 4e-4 of the loss, this model into 3e-7, and only the second leaves
    # room to see a fault of the loss.
    def __init__(self, words: int, headless: bool) -> None:
        super().__init__()
        self.headless = headless
        self.embedding = nn.Embedding(words, WIDTH)
        self.memory = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, words)

    def forward(self, inputs: Tensor) -> Tensor:
        """[batch, WINDOW] -> [batch * WINDOW, words], or WIDTH features where the loss has the
        head."""
        states, _ = self.memory(self.embedding(inputs))
        return (states if self.headless else self.head(states)).flatten(0, 1)


def language_model(linear: bool = False) -> Task:
    """With `linear`, the head is the loss's business."""
    documents = [words_of(text) for text in topics.values()]
    vocabulary = build_vocabulary(documents)
    inputs, targets = cut_windows(documents, vocabulary)
    words = len(vocabulary) + UNKNOWN + 1
    return Task(
        name="LM head" if linear else "language model",
        about=f"GRU on the Python manual, {sum(map(len, documents)):,} words, vocabulary {words:,}",
        make_model=lambda: WordModel(words, headless=linear),
        make_batches=lambda seed: shuffled_batches(inputs, targets, BATCH, seed),
        logits_shape=(BATCH * WINDOW, words),
        # At 1.0 it learns faster and is chaotic: two right losses are 5e-2 apart after 300 steps.
        learning_rate=0.5,
        steps=150,
        features=WIDTH if linear else None,
    )
