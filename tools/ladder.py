"""Compare the default with the published recipe over budgets and shapes: a scaling ladder.

    python -m tools.ladder train --dtype float32    # hours; run it twice to train two at a time
    python -m tools.ladder train --only '12x256-*'
    python -m tools.ladder report                   # tables of the runs that are finished
    python -m tools.ladder report --write docs/LADDER.md --plot docs/images/ladder.png

`train` sets recipe, shape and budget itself: it takes only the other flags of train_llm.py, such as
--data.source, and the defaults that --help shows for recipe and data may not apply. It resumes
interrupted runs and skips those that are finished or that another process is training. The run
runs/ladder-6x256-default-1M has 6 layers of 256, the default recipe and 1M tokens; `report` lists
the runs that are missing.

The published recipe has a constant learning rate, so evaluations of one long run are also results
of shorter runs. The default recipe's learning rate depends on the budget: it needs a run for each.
"""

import dataclasses
import gc
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

import train_llm
from common.config import RUNS, HumanInt, UserError, flatten, load_config, run_script, stop
from common.disk import write_text
from common.run import ROOT, git_state
from tools.record import code_of
from tools.scaling import rewritten
from tools.trials import FIXED, Trial, load_trial, markdown_table

SMALL, DEEP, PUBLISHED = (
    f"--config={ROOT}/configs/llm_{name}.yaml" for name in ("small", "deep", "published")
)
LARGE = "--model.n_layers=12 --model.d_model=384 --model.n_heads=6 --model.n_kv_heads=3"
# Of each shape: flags, budgets of the default recipe, budget of the published run, and how often to
# evaluate that run, so that it has results at the other budgets. Where there is one, the published
# run is 3 or 4 times as long, to reach the default's loss.
SHAPES = {
    "6x256": ([SMALL], ("250k", "500k", "1M", "2M", "4M"), "4M", 1 / 16),
    "12x256": ([SMALL, "--model.n_layers=12"], ("1M",), "3M", 1 / 12),
    "21x128": ([DEEP], ("1M",), "4M", 1 / 16),
    "12x384": ([SMALL, *LARGE.split(), "--model.d_ff=1536"], ("500k",), "1.5M", 1 / 12),
}
RECIPES = ("published", "default")
NAMES = [  # SHAPE-RECIPE-BUDGET of each run
    f"{shape}-{rest}"
    for shape, (_, budgets, published, _) in SHAPES.items()
    for rest in (f"published-{published}", *(f"default-{budget}" for budget in budgets[::-1]))
]
BATCH = 4096  # tokens per step of the published recipe, docs/LOG.md
# Settings that may differ from those of recipe and shape
FREE = r"run|only|seed|device|dtype|compile|micro_batch|save_every|log_every|wandb|gpu_hourly_usd"
FREE += r"|eval_tokens|sample_prompts|sample_tokens|data\..*|model\.vocab_size"
FITTED, TARGET = "6x256", 8e6  # the shape with enough budgets, and the tokens to extrapolate to
NOISE = 0.005  # nats, standard deviation over seeds: 0.0045 at 1M tokens, docs/LOG.md 2026-11-25

Curve = tuple[list[int], list[float]]  # tokens in ascending order, validation loss at each


def load(command: str, cls: type, argv: list[str]):
    prog = f"python -m tools.ladder {command}"
    return load_config(cls, argv, prog=prog, description=__doc__)


# ---- train
@dataclass
class TrainConfig(train_llm.Config):
    """Settings of `train`: which runs to train, and what they share."""

    run: str = "ladder"
    """Name of the ladder; its runs are NAME-6x256-default-1M and so on."""
    only: str = "*"
    """Name or pattern of the runs to train, such as 6x256-default-1M or '12x256-*'."""


def run_config(name: str, argv: list[str]) -> TrainConfig:
    """The settings of a run. Raises UserError if argv changes its recipe, shape or budget."""
    shape, recipe, budget = name.split("-")
    flags, _, _, eval_every = SHAPES[shape]
    words = [*flags, f"--tokens={budget}"]
    if recipe == "published":
        words = [PUBLISHED, *words, f"--batch_tokens={BATCH}", f"--eval_every={eval_every}"]
    own, cfg = (load("train", TrainConfig, [*words, *more]) for more in ([], argv))
    before = flatten(dataclasses.asdict(own))
    for key, value in flatten(dataclasses.asdict(cfg)).items():
        if value != before.get(key) and not re.fullmatch(FREE, key):
            raise UserError(f"--{key} is {value}, but the ladder sets {key} itself; omit it")
    return cfg


def train(argv: list[str]) -> None:
    """Train the runs that are neither finished nor in training elsewhere. Raises UserError."""
    only = run_config(NAMES[0], argv).only
    wanted = {name: run_config(name, argv) for name in NAMES if fnmatchcase(name, only)}
    if not wanted:
        raise UserError(f"--only {only!r} matches no run; the runs are {', '.join(NAMES)}")
    for name, cfg in wanted.items():
        cfg.run = f"{cfg.run}-{name}"
        run = RUNS / cfg.run
        # a code change can improve the default recipe, but not the published one
        is_kept = "-published-" in name and (run / "summary.json").exists()
        if run.exists() and not is_kept and code_of(run / "env.json") != git_state()["code_sha256"]:
            raise UserError(f"{run} was made by different code; choose another --run or delete it")
    RUNS.mkdir(exist_ok=True)
    for cfg in wanted.values():
        settings = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(train_llm.Config)}
        try:
            with FileLock(RUNS / f".{cfg.run}.lock", timeout=0):
                settings["resume"] = (RUNS / cfg.run).exists()
                train_llm.main(train_llm.Config(**settings))
        except Timeout:
            print(f"another process is training {cfg.run}", flush=True)
        except SystemExit as error:
            stop(f"{cfg.run} stopped; repeat this command to resume it", error.code)
        gc.collect()  # free this model before the next one is made


# ---- measurements
def load_runs(prefix: str) -> dict[str, Trial]:
    """The finished runs of a ladder by name. Raises UserError if they cannot be compared."""
    folders = {name: RUNS / f"{prefix}-{name}" for name in NAMES}
    found = {n: load_trial(f) for n, f in folders.items() if (f / "summary.json").exists()}
    if not found:
        raise UserError(f"no run {RUNS}/{prefix}-* is finished; train one or pass another --run")
    first = {}
    for name, trial in found.items():
        facts = {what: trial.summary[key] for what, key in FIXED.items()}
        facts["data.source"] = data_source(trial)
        # its hash covers as many tokens as the budget
        facts[f"first {trial.config['tokens']:,} training tokens"] = facts.pop("training data")
        if "-default-" in name:
            facts["code"] = trial.summary["code_sha256"]
        for what, value in facts.items():
            path, other = first.setdefault(what, (trial.path, value))
            if value != other:
                raise UserError(
                    f"{path} and {trial.path} differ in {what}: {other} and {value}; "
                    "delete one of them and train it again"
                )
    return found


def data_source(trial: Trial) -> str:
    items = (item for item in trial.config.items() if item[0].startswith("data.source"))
    return ", ".join(f"{key} {value}" for key, value in items)  # several in a mix


def curve(found: dict[str, Trial], shape: str, recipe: str) -> Curve:
    """All evaluations of the published run, or the last one of each of the default's runs."""
    names = [name for name in NAMES[::-1] if name.startswith(f"{shape}-{recipe}") and name in found]
    first = 0 if recipe == "published" else -1
    rows = [row for name in names for row in found[name].evaluations[first:]]
    return [row["tokens"] for row in rows], [row["val_loss"] for row in rows]


class PowerLaw:
    """The curve L = E + B (D / 1M)^-beta through losses L at D tokens, and its uncertainty.

    Allowed are the curves with E >= 0 whose sum of squared residuals is at most that of the best
    plus 3.84 sigma^2: a 95% profile-likelihood region. sigma is the standard deviation of the
    residuals, at least NOISE. Given beta, a curve is a regression line in (D / 1M)^-beta, so its
    allowed values at D are an interval.
    """

    def __init__(self, tokens: list[int], losses: list[float]):
        self.betas, self.n = np.linspace(0.02, 2, 991), len(tokens)
        x, y = self.power(tokens), np.array(losses)[:, None]  # (N, betas), (N, 1)
        self.mean, self.sxx = x.mean(0), ((x - x.mean(0)) ** 2).sum(0)  # (betas,)
        self.B = ((x - self.mean) * y).sum(0) / self.sxx
        self.E = y.mean() - self.B * self.mean
        sse = ((y - self.E - self.B * x) ** 2).sum(0)
        sse[self.E < 0] = np.inf
        self.sigma = max(NOISE, (sse.min() / (self.n - 3)) ** 0.5)
        slack = 3.84 * self.sigma**2 + sse.min() - sse
        self.best, self.allowed, self.slack = sse.argmin(), slack >= 0, np.maximum(slack, 0)

    def power(self, tokens) -> np.ndarray:
        return (np.array(tokens, float)[:, None] / 1e6) ** -self.betas  # (N, betas)

    def __call__(self, tokens) -> np.ndarray:
        """Best, lowest and highest allowed loss (3, N) at tokens (N,)."""
        x = self.power(tokens)
        center = self.E + self.B * x
        half = np.sqrt(self.slack * (1 / self.n + (x - self.mean) ** 2 / self.sxx))
        low, high = ((center + side)[:, self.allowed] for side in (-half, half))
        return np.stack([center[:, self.best], low.min(1), high.max(1)])


# ---- report
def needed(loss: float, curve: Curve, budget: float) -> str:
    """The tokens at which a curve first reaches a loss, and their ratio to a budget.

    Interpolates in log tokens; outside the measurements, gives a bound such as >4M (>2.00x).
    """
    tokens, losses = curve
    i = next((i for i, value in enumerate(losses) if value <= loss), None)
    if i is None:
        bound, count = ">", tokens[-1]
    elif i == 0:
        bound, count = "" if losses[0] == loss else "<", tokens[0]
    else:
        xs, ys = np.log(tokens[i - 1 : i + 1]), losses[i - 1 : i + 1]
        bound, count = "", np.exp(np.interp(loss, ys[::-1], xs[::-1]))
    text = f"{count / 1e6:.3g}M" if count >= 999_500 else f"{count / 1e3:.0f}k"
    return f"{bound}{text} ({bound}{count / budget:.2f}x)"


def seconds_per_token(trial: Trial) -> float:
    return trial.summary["train_seconds"] / trial.summary["tokens"]


def measured_table(found: dict[str, Trial]) -> str:
    """A row per shape and budget: losses, the tokens that each recipe needs for the other's loss,
    and the training time per token of the default, relative to the published recipe.
    """
    header = "shape | parameters (published / default) | tokens | published | default | difference"
    header += " | published needs for the default's loss | default needs for the published loss"
    header += " | default's time per token"
    rows = [header.split(" | ")]
    for shape, (_, budgets, longest, _) in SHAPES.items():
        published = found.get(f"{shape}-published-{longest}")
        sizes = {
            name.split("-")[1]: f"{trial.summary['params'] / 1e6:.1f}M"
            for name, trial in found.items()
            if name.startswith(f"{shape}-")
        }
        params = " / ".join(sizes.get(recipe, "-") for recipe in RECIPES)
        curves = [curve(found, shape, recipe) for recipe in RECIPES]
        for budget in budgets:
            tokens = HumanInt(budget) // BATCH * BATCH  # whole steps
            losses = [dict(zip(*points, strict=True)).get(tokens) for points in curves]
            cells = [f"{loss:.4f}" if loss else "-" for loss in losses] + ["-"] * 4
            if all(losses):
                both = zip(losses[::-1], curves, strict=True)
                needs = [needed(*x, tokens) for x in both]
                needs = ["-" if x.endswith("(<1.00x)") else x for x in needs]  # only this budget
                time = seconds_per_token(found[f"{shape}-default-{budget}"])
                ratio = f"{time / seconds_per_token(published):.2f}x"
                cells[2:] = [f"{losses[1] - losses[0]:+.4f}", *needs, ratio]
            rows.append([shape, params, budget, *cells])
    return markdown_table(rows)


def fit_table(laws: dict[str, PowerLaw]) -> str:
    """Both fits and what they predict: each number with the range over the allowed curves."""
    if len(laws) < 2:
        return f"A fit needs the published run and four budgets of the default at {FITTED}.\n"

    def spread(best: float, low: float, high: float) -> str:
        return f"{best:.3f} ({low:.3f} to {high:.3f})"

    rows = [["", "points", "sigma", "E", "beta", "loss at 8M tokens"]]
    for recipe, law in laws.items():
        (limit, loss), betas = law([np.inf, TARGET]).clip(0).T, law.betas[law.allowed]
        ranges = [limit, (law.betas[law.best], betas.min(), betas.max()), loss]
        rows.append([recipe, law.n, f"{law.sigma:.4f}", *(spread(*values) for values in ranges)])
    published, default = (law([TARGET])[:, 0] for law in laws.values())
    grid = np.geomspace(1e6, 1e9, 1000)
    best, low, high = laws["published"](grid)
    pairs = zip(default, (best, high, low), strict=True)
    best, most, fewest = (needed(loss, (grid, losses), TARGET) for loss, losses in pairs)
    return markdown_table(rows) + (
        f"\nAt 8M tokens, default minus published: {spread(*default - published[[0, 2, 1]])}.\n"
        f"Tokens that the published recipe needs for the default's loss there: {best},\n"
        f"between {fewest} and {most}.\n"
    )


def runs_table(found: dict[str, Trial]) -> str:
    """How the runs were made, and which are missing."""
    trials = list(found.values())
    facts = {
        "missing": [name for name in NAMES if name not in found],
        "machine": [t.machine for t in trials],
        "dtype, seed": [f"{t.config['dtype']}, {t.summary['seed']}" for t in trials],
        "commit": [f"{t.summary['commit']}{' dirty' * bool(t.summary['dirty'])}" for t in trials],
        "training text": [data_source(t) for t in trials],
        **{what: [t.summary[key][:12] for t in trials] for what, key in FIXED.items()},
    }
    rows = [[title, "; ".join(dict.fromkeys(values)) or "-"] for title, values in facts.items()]
    return markdown_table([["", ""], *rows])


def plot(found: dict[str, Trial], laws: dict[str, PowerLaw], path: str) -> None:
    """Plot the losses against tokens, and the fits with their allowed ranges, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, NullFormatter

    fig = Figure(figsize=(8, 4.5), dpi=120, layout="tight")
    ax = fig.subplots()
    for recipe, color in zip(RECIPES, ("C1", "C0"), strict=True):
        for shape, marker in zip(SHAPES, "osD^", strict=True):
            tokens, losses = curve(found, shape, recipe)
            if tokens:
                ax.plot(tokens, losses, marker, color=color, ms=5, label=f"{recipe}, {shape}")
        if law := laws.get(recipe):
            tokens = np.geomspace(min(curve(found, FITTED, recipe)[0]), TARGET)
            best, low, high = law(tokens)
            ax.plot(tokens, best, color=color, lw=1)
            ax.fill_between(tokens, low, high, color=color, alpha=0.25, lw=0)
    ax.set_xscale("log", base=2)
    ax.set_xticks([250e3 * 2**k for k in range(6)])  # 250k to 8M
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("tokens", fontsize=12)
    ax.set_ylabel("validation loss (nats per token)", fontsize=12)
    ax.tick_params(labelsize=11)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=10, ncols=2)
    fig.savefig(path, format="png")


@dataclass
class ReportConfig:
    """Settings of `report`."""

    run: str = "ladder"
    """Name of the ladder, as in `train`."""
    write: str = ""
    """Page whose tables to rewrite. Empty: print them."""
    plot: str = ""
    """PNG file for the plot. Empty: no plot."""


def report(argv: list[str]) -> None:
    """Print the tables of the finished runs, or rewrite them in a page. Raises UserError."""
    cfg = load("report", ReportConfig, argv)
    found = load_runs(cfg.run)
    curves = {recipe: curve(found, FITTED, recipe) for recipe in RECIPES}
    laws = {recipe: PowerLaw(*points) for recipe, points in curves.items() if len(points[0]) > 3}
    tables = {"ladder": measured_table(found), "fits": fit_table(laws), "runs": runs_table(found)}
    if cfg.write:
        page = Path(cfg.write)
        write_text(page, rewritten(page.read_text(encoding="utf-8"), tables))
    else:
        print("\n".join(f"{name}\n\n{text}" for name, text in tables.items()))
    if cfg.plot:
        plot(found, laws, cfg.plot)


def main(argv: list[str]) -> None:
    commands = {"train": train, "report": report}
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__)
    elif name not in commands:
        raise UserError(f"{name!r} is not a command; use {' or '.join(commands)}")
    else:
        commands[name](rest)


if __name__ == "__main__":
    run_script(main)
