import io
from pathlib import Path

import pytest
import torch
from conftest import script, train

import generate
from common import UserError, load_config


@pytest.fixture
def run(workdir):
    train(run="a", tokens=6400)
    return "a"


def write(*args: str) -> list[str]:
    return generate.main(load_config(generate.Config, list(args)))


def test_text_from_name_folder_and_checkpoint_is_the_same(run, capsys):
    Path(run).mkdir()  # a folder of data, say: the run of that name goes first
    texts = write(run, "--prompt", "a fox", "--max_tokens", "20")
    out = capsys.readouterr().out
    assert out == f"a fox{texts[0]}\n" and len(texts[0]) > 10  # streamed, and nothing else printed
    for place in ("runs/a", "runs/a/checkpoints/0000050"):
        assert write(place, "--prompt", "a fox", "--max_tokens", "20") == texts
    assert write("--prompt", "a fox", "--max_tokens", "20") == texts  # the newest run
    early, late = (
        generate.load_run(place, load_config(generate.Config, [place])).model
        for place in ("runs/a/checkpoints/0000045", "a")
    )
    assert not torch.equal(early.embed.weight, late.embed.weight)


def test_continuation_i_does_not_depend_on_how_many_there_are(run, capsys):
    four = write(run, "--prompt", "a fox", "--n", "4", "--max_tokens", "20", "--temperature", "1")
    assert (
        len(set(four)) > 1
        and write(run, "--prompt", "a fox", "--n", "2", "--max_tokens", "20", "--temperature", "1")
        == four[:2]
    )
    assert (
        write(run, "--prompt", "a fox", "--seed", "2", "--max_tokens", "20", "--temperature", "1")
        == four[2:3]
    )
    assert "--- 4/4\na fox" in capsys.readouterr().out


def test_prompt_from_file_and_standard_input(run):
    Path("p.txt").write_text("the Bär\n")
    expected = (
        "the Bär"
        + write(run, "--prompt", "the Bär", "--temperature", "0", "--max_tokens", "9")[0]
        + "\n"
    )
    for args, stdin in ((["--prompt", "FILE:p.txt"], None), ([], "the Bär\n")):
        done = script(
            "generate.py", run, "--temperature", "0", "--max_tokens", "9", *args, input=stdin
        )
        assert (done.stdout, done.returncode) == (expected, 0), done.stderr


def test_characters_of_several_tokens_come_out_whole(run):
    """This emoji is four byte tokens; one cut off at the end is dropped, and so is a stray byte."""
    loaded = generate.load_run(run, load_config(generate.Config, [run]))
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = tokenizer("x🐸y")["input_ids"]
    assert len(ids) > 4
    for cut, expected in ((ids, "x🐸y"), (ids[:-2], "x"), ([ids[0], ids[2], *ids[-1:]], "xy")):
        model.generate = lambda prompt, *_, **__: iter([prompt.new_tensor([i]) for i in cut])
        out = io.StringIO()
        texts = generate.continuations(
            model, tokenizer, "", 1, seed=0, max_tokens=9, temperature=1, out=out
        )
        assert texts == [expected] and out.getvalue() == expected


def test_end_of_text_ends_it(run):
    loaded = generate.load_run(run, load_config(generate.Config, [run]))
    model, tokenizer = loaded.model, loaded.tokenizer
    a, b = tokenizer("ab")["input_ids"]
    rows = [[a, a], [b, tokenizer.eos_token_id], [tokenizer.eos_token_id, b], [a, a]]
    model.generate = lambda prompt, *_, **__: iter([prompt.new_tensor(row) for row in rows])
    assert generate.continuations(model, tokenizer, "", 2, seed=0, max_tokens=9, temperature=1) == [
        "ab",
        "a",
    ]


def test_prompt_up_to_the_context_and_no_longer(run):
    with pytest.raises(UserError, match="the model's context 32: shorten it"):
        write(run, "--prompt", "q" * 32)  # and the end-of-text in front
    write(run, "--prompt", "q" * 31, "--max_tokens", "5")


@pytest.mark.parametrize(
    "args, says",
    [
        (["nobody"], "no run 'nobody'; the runs here are: a"),
        (["a", "--n", "0"], "--n is 0"),
        (["a", "--temperature", "-1"], "temperature -1.0"),
        (["a", "--kind", "image"], "cannot draw"),
        (["a", "--top_p", "0"], "top_p 0.0"),
        (["a", "--prompt", "FILE:none.txt"], "none.txt"),
        (["runs"], "has no checkpoint"),
    ],
)
def test_bad_input_is_one_clear_line(run, args, says):
    with pytest.raises(UserError) as error:
        write(*args, *([] if "--prompt" in args else ["--prompt", "x"]))
    assert says in str(error.value) and "\n" not in str(error.value)
