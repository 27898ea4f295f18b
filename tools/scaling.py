"""Recompute the tables of docs/SCALING.md from results of tools.bench.

    python -m tools.scaling docs/bench/*.json --write docs/SCALING.md
    python -m tools.scaling bench.json --price H100=3.20 --mfu 0.3 0.45    # prints the tables

Estimates follow these laws, for the defaults of train_llm.py:

    compute of a step = tokens * FLOPs per token / (cards * peak * MFU)
    all-reduce of the gradients = 2 (n - 1) / n * bytes / link bandwidth
    all-gather of Muon's updates = (n - 1) / n * bytes / link bandwidth
"""

import argparse
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import train_llm
from common.config import UserError, run_script, stop
from common.device import PEAK_BF16
from common.disk import write_text
from model import Llama
from muon import GROUPS
from tools.trials import markdown_table

BUDGETS = {"8M": 8e6, "20M": 20e6, "100M": 100e6, "1B": 1e9}
MFU = (0.25, 0.40)  # assumed; no GPU has run this code yet


@dataclass(frozen=True)
class Card:
    """A GPU: data-sheet figures and an assumed price."""

    name: str
    dtype: str
    peak: float  # dense FLOP/s in dtype
    link: str  # between 8 cards of a machine
    bandwidth: float  # of the link, bytes/s in each direction
    usd: float  # per hour, assumed 2026-11-28


CARDS = [
    Card("T4", "float32", 8.1e12, "PCIe 3.0", 16e9, 0.35),  # has no bf16
    Card("L4", "bfloat16", PEAK_BF16["L4"], "PCIe 4.0", 32e9, 0.70),
    Card("RTX 4090", "bfloat16", PEAK_BF16["RTX 4090"], "PCIe 4.0", 32e9, 0.45),
    Card("A100", "bfloat16", PEAK_BF16["A100"], "NVLink 3", 300e9, 1.60),
    Card("H100", "bfloat16", PEAK_BF16["H100"], "NVLink 4", 450e9, 2.60),
    Card("H200", "bfloat16", PEAK_BF16["H200"], "NVLink 4", 450e9, 3.50),
]


# ---- laws
@dataclass(frozen=True)
class Workload:
    """A training run with the defaults of train_llm.py."""

    tokens: float
    batch_tokens: int
    seq_len: int
    flops: float  # per token, forward and backward
    gradients: int  # numbers; all-reduced in fp32
    updates: int  # numbers in Muon's matrices; gathered in the compute dtype

    def cards_used(self, n: int) -> int:
        """Of n cards, those that the sequences of a step divide among evenly."""
        sequences = self.batch_tokens // self.seq_len
        return max(k for k in range(1, n + 1) if sequences % k == 0)

    def compute(self, card: Card, n: int, mfu: float) -> float:
        """Seconds of computation per step."""
        return self.batch_tokens * self.flops / (self.cards_used(n) * card.peak * mfu)

    def exchange(self, card: Card, n: int) -> float:
        """Seconds of communication per step; none of it overlaps with computation."""
        used = self.cards_used(n)
        bytes_per_update = torch.finfo(getattr(torch, card.dtype)).bits // 8
        moved = 2 * 4 * self.gradients + bytes_per_update * self.updates
        return (used - 1) / used * moved / card.bandwidth

    def seconds(self, card: Card, n: int, mfu: float) -> float:
        steps = self.tokens / self.batch_tokens
        return steps * (self.compute(card, n, mfu) + self.exchange(card, n))


def workload(tokens: float) -> Workload:
    """What train_llm.py does by default for a budget."""
    cfg = train_llm.Config(tokens=int(tokens))
    train_llm.resolve_recipe(cfg)
    with torch.device("meta"):
        model = Llama(cfg.model)
    params = dict(model.named_parameters())
    return Workload(
        tokens=tokens,
        batch_tokens=cfg.batch_tokens,
        seq_len=cfg.model.seq_len,
        flops=model.flops_per_token(),
        gradients=model.n_params(),
        updates=sum(p.numel() for name, p in params.items() if name.endswith(GROUPS["muon"])),
    )


# ---- text
def span(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def times(low: float, high: float) -> str:
    """A range of seconds in a unit that suits it."""
    scale, unit = next(
        (scale, unit)
        for limit, scale, unit in ((100, 1, "s"), (6000, 60, "min"), (float("inf"), 3600, "h"))
        if high < limit
    )
    return f"{span(rounded(low / scale), rounded(high / scale))} {unit}"


def rounded(value: float) -> str:
    """Two significant digits, and all digits before the decimal point."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def dollars(low: float, high: float) -> str:
    return "$" + span(
        *(f"{value:,.0f}" if value >= 10 else f"{value:.2f}" for value in (low, high))
    )


# ---- tables
def value(bench: dict, group: str, name: str) -> float | None:
    """The median of the row whose name matches the pattern, if there is one."""
    rows = (row for row in bench["rows"] if row["group"] == group)
    return next((row["median"] for row in rows if re.fullmatch(name, row["name"])), None)


def cell(number: float | None, form: str = ",.0f", unit: str = "") -> str:
    return "-" if number is None else f"{number:{form}}{unit}"


def machine_name(bench: dict) -> str:
    m, settings = bench["machine"], bench["settings"]
    compiled = "compiled" if settings["compile"] else "not compiled"
    return f"{m['device']}, {settings['dtype']}, {compiled}, {m['date']}"


def training_table(benches: list[dict]) -> str:
    """Measured training speed, a row per machine and batch size."""
    header = "machine | shape | tokens a step | tokens/s | step, ms | Muon, ms | "
    header += "of the matrix-product ceiling | MFU"
    rows = []
    for bench in benches:
        names = [row["name"] for row in bench["rows"] if row["group"] == "training"]
        for batch in dict.fromkeys(name.split()[0] for name in names if "tokens a step" in name):
            speed, step, muon, ceiling, mfu = (
                value(bench, "training", f"{batch} tokens a step: {name}")
                for name in ("speed", "step", "Muon", "of the matrix-product ceiling", "MFU")
            )
            numbers = (cell(speed), cell(step), cell(muon))
            parts = (cell(ceiling, ".0f", "%"), cell(mfu, ".0f", "%"))
            shape = bench["settings"]["shape"]
            rows.append([machine_name(bench), shape, batch, *numbers, *parts])
    return markdown_table([header.split(" | "), *rows])


def speed_table(benches: list[dict]) -> str:
    """Measured speed of everything else, a row per machine."""
    columns = {
        "matrix products, TFLOP/s": ("ceiling", "matrix product, {dtype}", ".2f"),
        "plain Llama / transformers": ("transformers", "[^,]+, {dtype} / [^,]+, {dtype}", ".2f"),
        "both compiled": ("transformers", r".+compiled / .+compiled", ".2f"),
        "plain Llama / transformers in fp32": ("transformers", "plain.+ / .+, float32", ".2f"),
        "text tokens/s, 1 text": ("generation", "text.+ batch 1", ",.0f"),
        "16 texts": ("generation", "text.+ batch 16", ",.0f"),
        "image tokens/s, 1 image": ("generation", "image of.+ batch 1", ",.0f"),
        "16 images": ("generation", "image of.+ batch 16", ",.0f"),
        "VQ-VAE training, images/s": ("vqvae", ".+", ",.0f"),
        "preparation, tokens/s": ("data", "preparation", ",.0f"),
        "of the bare tokenizer": ("data", "preparation / .+", ".2f"),
    }
    rows = [["machine", *columns]]
    for bench in benches:
        dtype = bench["settings"]["dtype"]
        numbers = (
            cell(value(bench, group, pattern.format(dtype=dtype)), form)
            for group, pattern, form in columns.values()
        )
        rows.append([machine_name(bench), *numbers])
    return markdown_table(rows)


def assumption_table(cards: list[Card], mfu: tuple) -> str:
    """What the estimates assume of each card."""
    rows = [["card", "dtype", "peak, TFLOP/s", "link of 8 cards", "GB/s", "price per hour"]]
    for card in cards:
        peak, link = f"{card.peak / 1e12:,.0f}", f"{card.bandwidth / 1e9:.0f}"
        rows.append([card.name, card.dtype, peak, card.link, link, f"${card.usd:.2f}"])
    low, high = (f"{100 * value:.0f}" for value in mfu)
    return f"Assumed MFU: {low} to {high}%.\n\n{markdown_table(rows)}"


def cost_table(cards: list[Card], n: int, mfu: tuple) -> str:
    """Estimated time and cost of each budget on n cards."""
    works = {name: workload(tokens) for name, tokens in BUDGETS.items()}
    rows = [["card", *works]]
    if n > 1:
        rows[0] = ["card", *(f"{name} ({w.cards_used(n)} cards)" for name, w in works.items())]
    for card in cards:
        row = [card.name if n == 1 else f"{n} x {card.name}"]
        for work in works.values():
            seconds = [work.seconds(card, n, value) for value in reversed(mfu)]  # fastest first
            costs = [n * card.usd * value / 3600 for value in seconds]
            row.append(f"{times(*seconds)}, {dollars(*costs)}")
        rows.append(row)
    return markdown_table(rows)


def step_table(cards: list[Card], benches: list[dict], n: int, mfu: tuple) -> str:
    """What limits a run: exchange between n cards, and preparation of the text."""
    work = workload(BUDGETS["1B"])
    speeds = [value(bench, "data", "preparation") for bench in benches]
    per_core = max(
        (s / b["machine"]["cpus"] for s, b in zip(speeds, benches, strict=True) if s), default=None
    )
    header = ["card", "tokens/s", "step, ms", f"step of {n} cards, ms", "of it communication, ms"]
    rows = [[*header, "cores for preparation", f"for {n} cards"]]
    for card in cards:
        row = [card.name]
        one, many = (
            [work.compute(card, k, value) + work.exchange(card, k) for value in reversed(mfu)]
            for k in (1, n)
        )
        fast, slow = (work.batch_tokens / value for value in one)
        row.append(span(rounded(slow), rounded(fast)))
        row += [span(*(rounded(1e3 * value) for value in values)) for values in (one, many)]
        row.append(rounded(1e3 * work.exchange(card, n)))
        for step in (one, many):
            cores = work.batch_tokens / min(step) / per_core if per_core else None
            row.append(cell(cores, ".1f"))
        rows.append(row)
    return markdown_table(rows)


def sections(benches: list[dict], cards: list[Card] = CARDS, mfu: tuple = MFU) -> dict[str, str]:
    """The tables of docs/SCALING.md by name."""
    return {
        "measured training": training_table(benches),
        "measured speed": speed_table(benches),
        "assumptions": assumption_table(cards, mfu),
        "one card": cost_table(cards, 1, mfu),
        "eight cards": cost_table(cards, 8, mfu),
        "limits": step_table(cards, benches, 8, mfu),
    }


def rewritten(page: str, tables: dict[str, str]) -> str:
    """A page with each table between `<!-- NAME -->` and `<!-- end -->`. Raises UserError."""
    for name, text in tables.items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, found, rest = page.partition(start)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise UserError(f"the page has no {start.strip()} with {end} after it; restore them")
        page = f"{before}{start}\n{text}\n{end}{after}"
    return page


# ---- command line
def load(path: str) -> dict:
    """The results in a file. Raises UserError."""
    try:
        bench = json.loads(Path(path).read_text(encoding="utf-8"))
        sections([bench])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a result of tools.bench; pass a file that python -m tools.bench --out "
            "NAME.json wrote"
        ) from error
    return bench


def priced(cards: list[Card], prices: list[str]) -> list[Card]:
    """The cards with the prices "NAME=USD" of a command line. Raises UserError."""
    names = [card.name for card in cards]
    for text in prices:
        name, _, usd = text.partition("=")
        if name not in names or not re.fullmatch(r"\d{1,6}(\.\d+)?", usd):
            raise UserError(
                f"--price {text!r} is not NAME=USD, such as H100=2.50; cards: {', '.join(names)}"
            )
        cards = [replace(card, usd=float(usd)) if card.name == name else card for card in cards]
    return cards


def parse(argv: list[str]) -> argparse.Namespace:
    """The checked command line. Raises UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.scaling",
        allow_abbrev=False,
        description="Print the tables of docs/SCALING.md, or rewrite them in the page.",
    )
    parser.error = lambda message: stop(message, 2)
    parser.add_argument("files", nargs="+", help="results of tools.bench")
    parser.add_argument("--write", metavar="PAGE", help="rewrite the tables of this page")
    parser.add_argument(
        "--price", nargs="+", default=[], metavar="NAME=USD", help="price of a card per hour"
    )
    parser.add_argument(
        "--mfu",
        nargs=2,
        type=float,
        default=MFU,
        metavar=("LOW", "HIGH"),
        help="between 0 and 1",
    )
    options = parser.parse_args(argv)
    low, high = options.mfu
    if not 0 < low <= high <= 1:
        raise UserError(f"--mfu is {low:g} {high:g}; pass two numbers, 0 < LOW <= HIGH <= 1")
    return options


def main(argv: list[str]) -> None:
    """Print the tables, or rewrite them in a page. Raises UserError."""
    options = parse(argv)
    cards = priced(CARDS, options.price)
    tables = sections([load(path) for path in options.files], cards, tuple(options.mfu))
    if not options.write:
        print("\n".join(f"{name}\n\n{text}" for name, text in tables.items()))
        return
    page = Path(options.write)
    if not page.is_file():
        raise UserError(f"--write {page}: there is no such page; pass docs/SCALING.md")
    write_text(page, rewritten(page.read_text(encoding="utf-8"), tables))
    print(f"wrote {page}")


if __name__ == "__main__":
    run_script(main)
