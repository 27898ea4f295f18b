"""The benchmark's table and file, and the page of estimates made from it."""

import json
from pathlib import Path

import pytest
import torch
from helpers import ROOT

import train_llm
from common.config import UserError, load_config
from model import Llama, ModelConfig
from tools import bench, scaling

COMMITTED = sorted((ROOT / "docs/bench").glob("*.json"))


def run_bench(*flags: str) -> dict:
    flags = ("--shape=tiny", "--device=cpu", "--compile=false", "--repeats=2", *flags)
    return bench.main(load_config(bench.Config, list(flags)))


def first_pieces(*args, first_texts=bench.first_texts) -> list[str]:
    """Pieces of the first texts: whole files are so few here that none may be held out."""
    return [text[i : i + 1000] for text in first_texts(*args) for i in range(0, len(text), 1000)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("bench"))
        patch.setattr(bench, "first_texts", first_pieces)
        patch.setattr("data.text.BATCH_DOCUMENTS", 8)
        run_bench("--dtype=bfloat16", "--out=all.json")
        yield json.loads(Path("all.json").read_text())


@pytest.fixture(scope="module")
def vqvae_only(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "a.json"
    run_bench("--only=vqvae", f"--out={path}")
    return path


def row_names(results: dict, group: str) -> list[str]:
    return [row["name"] for row in results["rows"] if row["group"] == group]


def small_bench(dtype="float32", repeats=3) -> bench.Bench:
    cfg = bench.Config(shape="tiny", dtype=dtype, repeats=repeats, compile=False, device="cpu")
    return bench.Bench(cfg, torch.device("cpu"), bench.SHAPES["tiny"])


# ---- the file
@pytest.mark.parametrize("group", ["ceiling", *bench.GROUPS])
def test_every_group_has_rows(results, group):
    assert row_names(results, group)


def test_a_row_has_a_unit_and_the_median_minimum_and_maximum_of_n_values(results):
    for row in results["rows"]:
        assert row["unit"], row
        assert 0 < row["min"] <= row["median"] <= row["max"], row
        assert row["n"] == (1 if "peak memory" in row["name"] else 2), row


@pytest.mark.parametrize("part", ["forward and loss gradient", "backward", "Muon", "AdamW"])
def test_a_training_step_is_divided_into_parts(results, part):
    assert f"64 tokens a step: {part}" in row_names(results, "training")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_transformers_is_compared_in_the_same_dtype_and_in_its_default(results, dtype):
    ratio = f"plain Llama, bfloat16 / transformers, {dtype}"
    assert ratio in row_names(results, "transformers")


def test_the_fraction_of_the_ceiling_follows_from_speed_and_matrix_products(results):
    value = {(row["group"], row["name"]): row["median"] for row in results["rows"]}
    model = bench.new_model(small_bench(), bench.default_recipe(bench.SHAPES["tiny"].text))
    flops = value["training", "64 tokens a step: speed"] * model.flops_per_token()
    ceiling = 1e12 * value["ceiling", "matrix product, bfloat16"]
    fraction = value["training", "64 tokens a step: of the matrix-product ceiling"]
    assert fraction == pytest.approx(100 * flops / ceiling)


def test_the_file_names_the_machine_and_the_code(results):
    assert {"device", "threads", "torch", "commit", "date"} <= results["machine"].keys()
    assert (results["settings"]["dtype"], results["settings"]["shape"]) == ("bfloat16", "tiny")


def test_only_the_chosen_groups_are_measured(vqvae_only):
    rows = json.loads(vqvae_only.read_text())["rows"]
    assert {row["group"] for row in rows} == {"ceiling", "vqvae"}


def test_the_default_recipe_has_every_addition_of_train_llm():
    default = train_llm.Config().model
    assert bench.default_recipe(ModelConfig(n_layers=default.n_layers)) == default


# ---- measuring
def test_sides_that_are_compared_take_turns():
    calls = []
    tiny = small_bench(repeats=3)
    tiny.timed = lambda run, n: run() or 1.0
    times = tiny.seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")})
    assert "".join(calls) == "ab" + 3 * "ab"  # warm-up, then rounds
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_a_fast_call_is_averaged_over_many_and_a_slow_one_is_not():
    counts = {}
    tiny = small_bench(repeats=2)
    limit = bench.SHAPES["tiny"].seconds
    cost = {"fast": limit / 20, "slow": 10 * limit}

    def timed(run, n: int) -> float:
        counts[run()] = n
        return n * cost[run()]

    tiny.timed = timed
    times = tiny.seconds({"fast": lambda: "fast", "slow": lambda: "slow"})
    assert counts == {"fast": 10, "slow": 1}
    assert times["fast"] == pytest.approx(2 * [cost["fast"]])


def test_the_word_tokenizer_gives_back_its_words():
    tokenizer = bench.word_tokenizer(50)
    assert tokenizer("w7 w49")["input_ids"] == [7, 49]
    assert (len(tokenizer), tokenizer.eos_token_id) == (50, 49)


@pytest.mark.parametrize(
    "value, text", [(0.0, "0"), (0.01234, "0.0123"), (1.234, "1.23"), (56789.1, "56,789")]
)
def test_numbers_have_three_digits_or_more(value, text):
    assert bench.number(value) == text


# ---- estimates
H100 = next(card for card in scaling.CARDS if card.name == "H100")


def test_time_on_one_card_is_flops_over_peak_times_mfu():
    with torch.device("meta"):
        model = Llama(train_llm.Config().model)
    expected = 1e9 * model.flops_per_token() / (989e12 * 0.4)
    work = scaling.workload(1e9)
    assert work.seconds(H100, 1, 0.4) == pytest.approx(expected, rel=1e-3)


def test_eight_cards_divide_the_computation_and_add_the_exchange():
    work = scaling.workload(1e9)
    moved = 7 / 8 * (8 * work.gradients + 2 * work.updates)  # fp32 all-reduce, bf16 all-gather
    assert work.exchange(H100, 8) == pytest.approx(moved / 450e9)
    step = work.compute(H100, 1, 0.3) / 8 + work.exchange(H100, 8)
    assert work.seconds(H100, 8, 0.3) == pytest.approx(1e9 / work.batch_tokens * step)


@pytest.mark.parametrize("tokens, used", [(8e6, 4), (20e6, 8)])
def test_a_step_uses_at_most_as_many_cards_as_it_has_sequences(tokens, used):
    assert scaling.workload(tokens).cards_used(8) == used


def test_one_card_exchanges_nothing():
    assert scaling.workload(8e6).exchange(H100, 1) == 0


@pytest.mark.parametrize(
    "seconds, text", [((20, 50), "20 to 50 s"), ((60, 300), "1 to 5 min"), ((9e3, 9e3), "2.5 h")]
)
def test_times_are_in_a_unit_that_suits_them(seconds, text):
    assert scaling.times(*seconds) == text


def test_prices_of_the_command_line_replace_the_assumed_ones():
    cards = scaling.priced(scaling.CARDS, ["H100=9.5", "RTX 4090=1"])
    changed = {card.name: card.usd for card in cards if card not in scaling.CARDS}
    assert changed == {"H100": 9.5, "RTX 4090": 1.0}


def test_a_result_without_some_groups_has_dashes_in_the_tables(vqvae_only):
    tables = scaling.sections([scaling.load(str(vqvae_only))])
    assert tables["measured speed"].splitlines()[-1].count(" - ") >= 8


# ---- the page
def test_the_page_of_estimates_has_the_tables_of_the_committed_results():
    page = (ROOT / "docs/SCALING.md").read_text()
    tables = scaling.sections([scaling.load(str(path)) for path in COMMITTED])
    assert scaling.rewritten(page, tables) == page


def test_rewriting_a_page_replaces_its_tables_and_keeps_the_rest():
    page = "a\n<!-- x -->\nold\n<!-- end -->\nb\n<!-- y -->\n<!-- end -->\n"
    expected = "a\n<!-- x -->\n\n1\n<!-- end -->\nb\n<!-- y -->\n\n2\n<!-- end -->\n"
    assert scaling.rewritten(page, {"x": "1", "y": "2"}) == expected


def test_a_page_without_the_place_for_a_table_is_refused():
    with pytest.raises(UserError, match="<!-- x -->"):
        scaling.rewritten("no tables", {"x": "1"})
