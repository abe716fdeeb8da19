"""What the README and the pages of docs/ print runs, and is so; no name and no link is missing.

What they write for Transformers is run by tests/integrations/test_pages_of_transformers.py. Their
tables are held against torch and the packages that they name by test_libraries.py and
test_example_programs.py.
"""

import json
import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.pages import blocks, pages, section, text_of
from support.processes import ROOT
from support.ranks import in_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fused_ce
from fused_ce.integrations import transformers as integration

CLASSES = 128256  # of a sharded vocabulary, as the pages have it


def is_of_transformers(block):
    return re.search("transformers|explain_head", block.code)


def is_of_ranks(block):
    return re.search("process_group|Shard", block.code)


OF_RANKS = [page for page in pages() if any(map(is_of_ranks, blocks(page)))]


def names():
    """What the examples are about; a reader has the like of it."""
    model, head = nn.Linear(4, 80), nn.Linear(8, 30, bias=False)
    hidden, input = torch.randn(2, 6, 8, requires_grad=True), torch.randn(6, 4)
    logits, target = torch.randn(6, 80, requires_grad=True), torch.randint(0, 80, (6,))
    return {
        "torch": torch,
        "F": F,
        "nn": nn,
        "fused_ce": fused_ce,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loader": [(input, target)],
        "input": input,
        "target": target,
        "logits": logits,
        "labels": torch.rand(6, 80).round(),
        "teacher": torch.rand(6, 80).softmax(1),
        "student_logits": logits,
        "teacher_logits": torch.randn(6, 80),
        "weight": torch.rand(6),
        "num_items": 4,
        "hidden": hidden,
        "head": head,
        "rows": head(hidden),
        "tokens": torch.randint(0, 30, (2, 6)),
        "advantage": torch.randn(2, 6),
    }


@pytest.mark.parametrize("page", pages())
def test_every_example_of_a_page_runs_and_prints_what_it_shows(page):
    given = names()
    for block in blocks(page):
        if not is_of_transformers(block) and not is_of_ranks(block):
            block.run(given)


class Heard:
    """The package, and the losses that an example has computed with it."""

    def __init__(self):
        self.losses = []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            loss = getattr(fused_ce, name)(*args, **kwargs)
            self.losses.append(loss.full_tensor() if isinstance(loss, DTensor) else loss)
            return loss

        return call


@pytest.mark.parametrize("page", OF_RANKS)
def test_every_example_of_a_sharded_vocabulary_has_the_loss_of_the_whole(page):
    logits, target = torch.randn(3, CLASSES), torch.randint(0, CLASSES, (3,))
    hidden, weight = torch.randn(3, 4), torch.randn(CLASSES, 4)

    def run(rank):
        mesh = init_device_mesh("cpu", (2,))
        heard = Heard()
        for block in filter(is_of_ranks, blocks(page)):
            if "process_group" in block.code:
                own_logits, own_weight = logits.chunk(2, 1)[rank], weight.chunk(2)[rank]
                same = hidden, target
            else:
                own_logits = distribute_tensor(logits, mesh, [Shard(1)])
                own_weight = distribute_tensor(weight, mesh, [Shard(0)])
                same = [distribute_tensor(t, mesh, [Replicate()]) for t in (hidden, target)]
            given = {"logits": own_logits, "own_logits": own_logits, "own_weight": own_weight}
            given |= {"head": SimpleNamespace(weight=own_weight), "group": dist.group.WORLD}
            given |= {"hidden": same[0], "target": same[1], "tokens": same[1]}
            block.run(given | {"fused_ce": heard})
        return [loss.item() for loss in heard.losses]

    expected = [F.cross_entropy(x, target).item() for x in (logits, hidden @ weight.T)]
    for losses in in_ranks(2, run):
        pairs = [losses[i : i + 2] for i in range(0, len(losses), 2)]
        assert pairs and all(pair == pytest.approx(expected, rel=1e-5) for pair in pairs)


def test_every_public_name_is_in_the_reference():
    listed = []
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        text = page.read_text()
        (module,) = re.findall(r"^\.\. currentmodule:: (\S+)$", text, re.M)
        listed += [f"{module}.{n}" for n in re.findall(r"^\.\. auto\w+:: (\w+)", text, re.M)]
    public = [f"fused_ce.{name}" for name in fused_ce.__all__]
    public += [f"{integration.__name__}.{name}" for name in integration.__all__]
    assert sorted(listed) == sorted(public)


def test_every_page_is_in_the_contents():
    listed = set(re.findall(r"^([\w/]+)$", text_of("docs/index.md"), re.M))
    docs = ROOT / "docs"
    there = {str(p.relative_to(docs).with_suffix("")) for p in docs.rglob("*.md")} - {"index"}
    assert there <= listed


@pytest.mark.parametrize("page", [*pages(), "CONTRIBUTING.md", "bench/README.md"])
def test_every_link_into_the_repository_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", text_of(page), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match("https?:", target):
            path, _, anchor = target.partition("#")
            file = (ROOT / page).parent / path if path else ROOT / page
            assert file.exists(), target
            if anchor:
                titles = re.findall(r"^#+ (.+)$", file.read_text(), re.M)
                assert anchor in {anchor_of(title) for title in titles}, target


def anchor_of(title):
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def test_the_readmes_table_of_speed_is_what_was_measured():
    cases = json.loads((ROOT / "bench/results/bench.json").read_text())["cases"]
    measured = {
        case["name"]: {r["provider"]: r for r in case["results"] if r["pass"] != "forward"}
        for case in cases
    }
    rows = re.findall(
        r"^\| (\d[\dx ]+) \| (.*) \|$", section("README.md", "Speed and memory"), re.M
    )
    assert len(rows) == 6
    for logits, cells in rows:
        of = measured[logits.replace(" ", "")]
        times = [f"{of[p]['median_ms']:.1f}" for p in ("stock", "compile", "fused", "inplace")]
        memory = [of[p]["peak_extra_bytes"] / 1e6 for p in ("stock", "fused", "inplace")]
        memory = [f"{each:.0f} MB" if each >= 0.5 else "< 0.5 MB" for each in memory]
        assert cells.split(" | ") == times + memory
