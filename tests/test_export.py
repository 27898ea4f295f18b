"""tools/export_hf.py: what transformers computes with an exported folder is what model.py does."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import MODULES, ROOT, script, sentences, train, train_stage, weights, write_jsonl
from safetensors.torch import load_file, save_file

import generate
from common.config import UserError, load_config
from common.run import find_run
from model import Llama, ModelConfig
from pretrained import is_plain, load_checkpoint_of
from tools import export_hf

EXTRAS = {"model__value_embed": "true", "model__canon": 3, "model__subwords": 50}
EXTRAS |= {"model__pointer": 8}
PLAIN = {"model__value_embed": "false", "model__canon": 0, "model__pointer": 0}
RUNS = {  # vocab_size is larger than the tokenizer, so some entries have no token
    "extras": EXTRAS | {"model__vocab_size": 310},
    "plain": PLAIN | {"model__subwords": 50, "model__vocab_size": 310},
}
FROZEN = {"muon_lr": 1e-9, "muon_wd": 0, "adamw_lr": 1e-9}
PROMPTS = ["one 🦊 sees a frog", "my"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A working directory with a run of every kind, and an export of each in exports/."""
    folder = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_MODULES_CACHE", str(folder / "modules"))
        modules = "transformers.dynamic_module_utils.HF_MODULES_CACHE"
        patch.setattr(modules, str(folder / "modules"))
        # other tests of this process may have imported exports from elsewhere
        patch.syspath_prepend(str(folder / "modules"))
        for name in list(sys.modules):
            if name.split(".")[0] == "transformers_modules":
                patch.delitem(sys.modules, name)
        write_jsonl("corpus.jsonl", sentences(300))
        for name, settings in RUNS.items():
            train(run=name, muon_lr=0.05, adamw_lr=0.02, **settings)
        train_stage(MODULES["vqvae"], run="v", images=16)
        train_stage(MODULES["multimodal"], run="images", vqvae="v", sequences=16)
        for name in (*RUNS, "images"):
            export_hf.export(name, Path("exports") / name)
        yield folder


@pytest.fixture(autouse=True)
def in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


def ours(name: str) -> Llama:
    """The model of a run as generate.py uses it."""
    return load_checkpoint_of(*find_run(name))[0].for_inference()


def theirs(name: str):
    """The exported model of a run and its tokenizer, in transformers."""
    folder, trust = f"exports/{name}", {"trust_remote_code": name != "plain"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **trust)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **trust), tokenizer


def random_tokens(B: int, T: int) -> torch.Tensor:
    return torch.randint(300, (B, T), generator=torch.Generator().manual_seed(0))


# ---- logits
@pytest.mark.parametrize("name", [*RUNS, "images"])
@torch.no_grad()
def test_exported_logits_equal_ours(name):
    tokens, (model, tokenizer) = random_tokens(3, 32), theirs(name)
    expected = ours(name)(tokens)[..., : model.config.vocab_size]
    torch.testing.assert_close(model(tokens).logits, expected, atol=1e-5, rtol=0)
    n_entries = len(tokenizer) if name == "images" else 310
    assert expected.shape[-1] == n_entries
    assert expected.std() > 0.1


@pytest.mark.parametrize("name", ["extras", "plain"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_on_either_side_does_not_change_logits(name, use_cache, side):
    tokens, lengths = random_tokens(3, 20), (20, 13, 1)
    model, original = theirs(name)[0], ours(name)
    padded, mask = torch.zeros_like(tokens), torch.zeros_like(tokens)
    places = [slice(20 - n, 20) if side == "left" else slice(n) for n in lengths]
    for i, (n, place) in enumerate(zip(lengths, places, strict=True)):
        padded[i, place], mask[i, place] = tokens[i, :n], 1
    logits = model(padded, attention_mask=mask, use_cache=use_cache).logits
    assert logits.isfinite().all()
    for i, (n, place) in enumerate(zip(lengths, places, strict=True)):
        expected = original(tokens[i : i + 1, :n])[0]
        torch.testing.assert_close(logits[i, place], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("parts", [(1, 1, 1), (5, 3)])
@torch.no_grad()
def test_decoding_with_a_cache_equals_the_whole_forward_pass(side, parts):
    tokens, model, original = random_tokens(2, 12 + sum(parts)), theirs("extras")[0], ours("extras")
    mask = torch.ones(2, 12, dtype=torch.long)
    prompt = tokens[:, :12].clone()
    if side == "left":
        mask[1, :4], prompt[1, 4:] = 0, tokens[1, :8]
    else:
        mask[1, 8:] = 0
    cache, logits = model(prompt, attention_mask=mask).past_key_values, []
    new = torch.stack([tokens[0, 12:], tokens[1, 8:-4]])
    for part in new.split(parts, dim=1):
        mask = torch.cat((mask, torch.ones_like(part)), dim=1)
        logits.append(model(part, attention_mask=mask, past_key_values=cache).logits)
    for i, n in enumerate((12, 8)):
        expected = original(tokens[i : i + 1, : n + sum(parts)])[0, n:]
        torch.testing.assert_close(torch.cat(logits, 1)[i], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_cache_that_grows_beyond_its_first_size_stays_exact():
    config = {"vocab_size": 50, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
    shape = ModelConfig(**config, d_ff=64, seq_len=400, canon=2, value_embed=True, pointer=8)
    folder = Path("grown")
    original = Llama(shape)
    original.init_weights(torch.Generator().manual_seed(0))
    folder.mkdir()
    export_hf.write_model(original, 0, 50, folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokens = torch.randint(50, (2, 400))
    cache, logits = None, []
    for part in tokens.split((60, 1, 300, 1, 38), dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), original(tokens), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_reordered_cache_continues_the_other_sequences():
    tokens, (model, _) = random_tokens(2, 14), theirs("extras")
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    order = torch.tensor([1, 0, 1])

    def continued(rows: torch.Tensor, cache) -> torch.Tensor:
        whole = torch.cat((mask[rows], torch.ones(len(rows), 2, dtype=torch.long)), dim=1)
        return model(tokens[rows, 12:], attention_mask=whole, past_key_values=cache).logits

    caches = [model(tokens[:, :12], attention_mask=mask).past_key_values for _ in range(2)]
    caches[1].reorder_cache(order)
    expected = continued(torch.arange(2), caches[0])[order]
    torch.testing.assert_close(continued(order, caches[1]), expected, atol=1e-5, rtol=0)


def test_labels_give_the_loss_and_the_gradient_of_the_run():
    (model, _), tokens, original = theirs("extras"), random_tokens(2, 20), ours("extras")
    model.train()
    labels = tokens.clone()
    labels[:, :5] = -100
    output = model(tokens, labels=labels)
    expected = F.cross_entropy(original(tokens)[:, 4:-1].flatten(0, 1), tokens[:, 5:].flatten())
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=0)
    output.loss.backward()
    assert output.past_key_values is None
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("keep", [1, 6, torch.tensor([2, 8, 9])], ids=["1", "6", "indices"])
@pytest.mark.parametrize("padding", ["none", "right", "scattered"])
@torch.no_grad()
def test_logits_to_keep_are_those_of_all_positions(keep, padding):
    tokens, (model, _) = random_tokens(2, 12), theirs("extras")
    mask = torch.ones_like(tokens)
    if padding != "none":
        mask[1, {"right": [10, 11], "scattered": [0, 3, 4]}[padding]] = 0
    every = model(tokens, attention_mask=mask).logits
    expected = every[:, -keep:] if isinstance(keep, int) else every[:, keep]
    kept = model(tokens, attention_mask=mask, logits_to_keep=keep).logits
    torch.testing.assert_close(kept, expected, atol=1e-5, rtol=0)
    lone = model(tokens[1:, mask[1].bool()]).logits
    torch.testing.assert_close(every[1:, mask[1].bool()], lone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_gradient(side):
    tokens, gradients = random_tokens(1, 12), []
    for n in (0, 5):
        model, _ = theirs("extras")
        model.train()
        pad = (n, 0) if side == "left" else (0, n)
        mask = F.pad(torch.ones_like(tokens), pad)
        labels = F.pad(tokens, pad, value=-100)
        if side == "left":
            labels[:, n] = -100  # the padding before it predicts nothing
        model(F.pad(tokens, pad, value=7), attention_mask=mask, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert expected.any(), name
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-5, rtol=1e-3, msg=name)


@torch.no_grad()
def test_a_model_in_bfloat16_keeps_exact_rotation_angles():
    model, _ = theirs("extras")
    expected = model.model.cos.clone()
    tokens = random_tokens(1, 20)
    logits = model.bfloat16()(tokens).logits
    assert torch.equal(model.model.cos, expected)
    assert model.model.compute_dtype == torch.bfloat16
    assert (logits - ours("extras")(tokens)).abs().max() < 0.3


# ---- generation
@pytest.mark.parametrize("name", [*RUNS, "images"])
def test_greedy_generation_equals_generate_py_at_temperature_zero(name):
    model, tokenizer = theirs(name)
    for prompt in PROMPTS:
        settings = ["--kind=text", "--temperature=0", "--max_tokens=12", "--device=cpu"]
        args = [name, f"--prompt={prompt}", "--dtype=float32", *settings]
        (expected,) = generate.main(load_config(generate.Config, args))
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        new = tokens[0, inputs["input_ids"].shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=True).replace("\ufffd", "")
        assert text == expected


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_beams": 3, "use_cache": False}])
@pytest.mark.parametrize("name", RUNS)
def test_generation_in_a_padded_batch_equals_generation_of_each_prompt(name, settings):
    model, tokenizer = theirs(name)
    settings = {"max_new_tokens": 10, "do_sample": False} | settings
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert batch["attention_mask"].min() == 0
    together = model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]
    for prompt, row in zip(PROMPTS, together, strict=True):
        single = tokenizer(prompt, return_tensors="pt")
        alone = model.generate(**single, **settings)[0, single["input_ids"].shape[1] :]
        assert row[: len(alone)].tolist() == alone.tolist()


def test_beams_find_a_text_at_least_as_likely_as_greedy_decoding():
    model, tokenizer = theirs("extras")
    inputs = tokenizer("one", return_tensors="pt")

    @torch.no_grad()
    def log_likelihood(tokens: torch.Tensor) -> float:
        labels = tokens.clone()
        labels[:, : inputs["input_ids"].shape[1]] = -100
        return -float(model(tokens, labels=labels).loss)

    settings = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    greedy, beams = (model.generate(**inputs, **settings, num_beams=n) for n in (1, 5))
    assert not torch.equal(greedy, beams)
    assert log_likelihood(beams) > log_likelihood(greedy)


def test_the_pipeline_generates_text():
    trust = {"trust_remote_code": True}
    pipe = transformers.pipeline("text-generation", model="exports/extras", **trust)
    ((first,), (second,)) = pipe(PROMPTS, batch_size=2, max_new_tokens=5, do_sample=False)
    assert first["generated_text"].startswith(PROMPTS[0])
    assert len(second["generated_text"]) > len(PROMPTS[1])


def test_generation_ends_where_the_context_is_full():
    model, tokenizer = theirs("extras")
    settings = {"max_new_tokens": 99, "min_new_tokens": 99, "do_sample": False}
    assert model.generate(random_tokens(2, 30), **settings).shape == (2, 32)
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert pipe("one")[0]["generated_text"].startswith("one")  # its default is 256 new tokens


def test_entries_without_a_token_are_never_generated():
    model, tokenizer = theirs("extras")
    with torch.no_grad():
        model.model.embed.weight[len(tokenizer) :] = model.model.embed.weight.mean(0) * 50
    tokens = model.generate(random_tokens(4, 5), max_new_tokens=20, do_sample=True)
    assert tokens[:, 5:].max() < len(tokenizer) < model.config.vocab_size


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask has shape \(1, 3\)"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "attention_mask has shape"),
        ({"input_ids": torch.zeros(1, 33, dtype=torch.long)}, "33 positions, .* context is 32"),
    ],
)
def test_what_the_model_cannot_compute_is_refused(arguments, message):
    model, _ = theirs("extras")
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": random_tokens(1, 4)} | arguments)


def test_padding_after_cached_positions_is_refused():
    model, _ = theirs("extras")
    cache = model(random_tokens(1, 4)).past_key_values
    mask = torch.tensor([[1, 1, 1, 1, 0, 1]])
    with pytest.raises(ValueError, match="after the first call, it may hide only the padding"):
        model(random_tokens(1, 2), attention_mask=mask, past_key_values=cache)


@pytest.mark.extra
def test_the_trainer_of_transformers_fine_tunes_an_export(tmp_path):
    model, tokenizer = theirs("extras")
    texts = [
        {"input_ids": tokenizer(text).input_ids[:n]}
        for text, n in zip(PROMPTS, (9, 4), strict=True)
    ]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=3, report_to=[], use_cpu=True, logging_steps=1, save_strategy="no"
    )
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = transformers.Trainer(model, arguments, train_dataset=texts, data_collator=collator)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_unsupported_generation_is_refused():
    model, _ = theirs("extras")
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(random_tokens(1, 4), assistant_model=model, max_new_tokens=2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'inputs_embeds'"):
        model.generate(inputs_embeds=torch.zeros(1, 4, 32), max_new_tokens=2)


# ---- the folder
FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert not any("ROOT" == path for path in sys.path)
trust = {"trust_remote_code": sys.argv[2] == "trust"}
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], **trust)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **trust)
inputs = tokenizer("one fox", return_tensors="pt")
torch.save(model(**inputs).logits, "logits.pt")
assert not {"pretrained", "sampling", "common"} & set(sys.modules)
"""


@pytest.mark.parametrize("name, trust", [("extras", "trust"), ("plain", "no")])
def test_the_folder_loads_in_a_fresh_process_without_the_repository(name, trust, tmp_path):
    shutil.copytree(f"exports/{name}", tmp_path / "moved")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    env.pop("HF_MODULES_CACHE", None)
    command = [sys.executable, "-c", FRESH.replace("ROOT", str(ROOT)), "moved", trust]
    process = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    tokens = theirs(name)[1]("one fox", return_tensors="pt")["input_ids"]
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(logits, ours(name)(tokens), atol=1e-5, rtol=0)


def test_a_plain_model_is_exported_to_a_class_of_transformers():
    model, _ = theirs("plain")
    assert type(model).__module__ == "transformers.models.apertus.modeling_apertus"
    assert not list(Path("exports/plain").glob("*.py"))


@pytest.mark.parametrize("addition", [{"value_embed": True}, {"canon": 1}, {"pointer": 8}], ids=str)
def test_a_model_with_an_addition_needs_its_own_code(addition):
    assert is_plain(ModelConfig(subwords=9))
    assert not is_plain(ModelConfig(**addition))


def test_the_exported_code_is_model_py_itself():
    assert Path("exports/extras/model.py").read_bytes() == (ROOT / "model.py").read_bytes()


def test_the_tokenizer_puts_end_of_text_before_a_text_as_training_did():
    tokenizer = theirs("extras")[1]
    assert tokenizer("a").input_ids == [0, *tokenizer("a", add_special_tokens=False).input_ids]
    assert tokenizer.convert_ids_to_tokens(0) == "<|endoftext|>" == tokenizer.bos_token
    assert theirs("extras")[0].generation_config.pad_token_id == 0 == tokenizer.pad_token_id
    for text in sentences(20):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_a_model_saved_by_transformers_loads_again():
    model, _ = theirs("extras")
    model.save_pretrained("saved")
    trust = {"trust_remote_code": True}
    again = transformers.AutoModelForCausalLM.from_pretrained("saved", **trust)
    tokens = random_tokens(1, 9)
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_a_model_made_from_the_config_alone_is_initialized():
    config = theirs("extras")[0].config
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    logits = model(random_tokens(2, 20)).logits
    assert 0 < logits.std() < 1
    assert not model.model.blocks[0].attn_canon.weight.any()
    assert not model.model.pointer.sentinel.weight.any()


# ---- the model card
def card(name: str) -> str:
    return Path(f"exports/{name}/README.md").read_text()


def test_the_card_has_results_recipe_data_command_and_limits():
    text, summary = card("extras"), json.loads(Path("runs/extras/summary.json").read_text())
    assert f"| validation loss, nats per token | {summary['val_loss']:.4f} |" in text
    assert f"| training tokens | {summary['tokens']:,} |" in text
    assert "muon_lr: 0.05" in text
    assert "source: corpus.jsonl" in text
    assert re.search(r"^python .+", text, re.M)
    assert "## Limits" in text
    assert "trust_remote_code=True" in text
    assert "trust_remote_code" not in card("plain")


def test_the_card_of_a_continued_model_names_what_it_started_from():
    settings = RUNS["extras"] | {"data__tokenizer": "runs/extras/tokenizer", "tokens": 256}
    train(run="continued", init_from="extras", **settings)
    export_hf.export("continued", Path("exports/continued"))
    assert "trained from extras with Blueberry" in card("continued")
    assert "trained from scratch with Blueberry" in card("extras")


def test_the_snippet_in_the_card_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", card("extras"), re.S)
    exec(code.replace("max_new_tokens=100", "max_new_tokens=5"), {})
    assert "Once upon a time" in capsys.readouterr().out


def test_the_card_of_a_multimodal_run_explains_its_image_tokens():
    text = card("images")
    assert "`<seg_start>` (300), `<seg_end>` (301) and the\n16 image tokens from 302 to 317" in text
    assert "Image tokens" not in card("extras")


def test_the_card_of_an_unfinished_run_says_so():
    first = min(Path("runs/extras/checkpoints").iterdir())
    export_hf.export(str(first), Path("exports/first"))
    assert "before the training had finished" in card("first")
    assert "training seconds" not in card("first")


@pytest.mark.parametrize(
    "source, datasets",
    [
        ("corpus.jsonl", None),
        ("stdlib", None),
        ("owner/texts", ["owner/texts"]),
        ({"owner/texts:part-a": 0.5, "owner/texts:b": 0.2, "x/*.txt": 0.3}, ["owner/texts"]),
    ],
)
def test_the_card_lists_the_data_sets_of_the_hub(source, datasets):
    assert export_hf.header(source).get("datasets") == datasets


# ---- uploading
class Hub(BaseHTTPRequestHandler):
    """The part of the hub that an upload uses; `files` are those of the last commit."""

    files: dict[str, bytes] = {}

    def log_message(self, *args) -> None:
        pass

    def answer(self, value, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.answer({"id": "me/model", "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer hf_right":
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path.endswith("/repos/create"):
            self.answer({"url": "https://huggingface.co/me/model", "name": "me/model"})
        elif "/preupload/" in self.path:
            modes = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], **modes} for f in files]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    Hub.files[value["path"]] = base64.b64decode(value["content"])
            url = "https://huggingface.co/me/model/commit/1"
            self.answer({"commitUrl": url, "commitOid": "1" * 40, "success": True})
        else:
            self.answer({}, 200)


PUSH = """
import sys
from common.config import run_script
from tools import export_hf
run_script(export_hf.main, export_hf.Config)
"""


def pushed(out: str, token: str, url: str, repository: str = "me/model"):
    env = dict(os.environ) | {"HF_ENDPOINT": url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    return script("-c", PUSH, "extras", out, f"--push={repository}", env=env)


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    Hub.files = {}
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_push_uploads_every_file(hub, tmp_path):
    out = tmp_path / "model"
    process = pushed(str(out), "hf_right", hub)
    assert process.returncode == 0, process.stderr
    assert Hub.files == {file.name: file.read_bytes() for file in out.iterdir()}
    assert '"me/model"' in Hub.files["README.md"].decode()


def test_a_failed_upload_is_one_line_and_keeps_the_folder(hub, tmp_path):
    process = pushed(str(tmp_path / "model"), "hf_wrong", hub)
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert "cannot upload to me/model" in line
    assert f"hf upload me/model {tmp_path / 'model'}" in line
    assert "hf_wrong" not in process.stderr
    assert (tmp_path / "model/model.safetensors").exists()


def test_a_wrong_repository_name_is_refused_before_anything_is_written(tmp_path):
    process = pushed(str(tmp_path / "model"), "hf_right", "http://127.0.0.1:9", "model")
    assert (process.returncode, process.stderr.count("\n")) == (2, 1)
    assert "--push is 'model'; it must be USER/REPO" in process.stderr
    assert not (tmp_path / "model").exists()


# ---- errors
def no_checkpoint() -> None:
    Path("runs/empty/checkpoints").mkdir(parents=True, exist_ok=True)
    text = Path("runs/extras/config.yaml").read_text()
    Path("runs/empty/config.yaml").write_text(text)


@pytest.mark.parametrize(
    "run, out, message",
    [
        ("v", "new", "runs/v is a VQ-VAE run, which has no language model"),
        ("none", "new", "there is no run 'none'"),
        ("empty", "new", "runs/empty has no checkpoint"),
        ("extras", "exports", "exports exists; delete it or choose another folder"),
        ("extras", "corpus.jsonl/new", "cannot write corpus.jsonl/new: Not a directory"),
        ("", "new", "the following arguments are required: out"),
        ("exports/plain", "new", "exports/plain is an exported folder; pass the run"),
    ],
)
def test_wrong_input_is_a_one_line_error_and_writes_nothing(run, out, message):
    no_checkpoint()
    before = sorted(Path().iterdir())
    with pytest.raises(UserError) as error:
        export_hf.main(load_config(export_hf.Config, [run, out] if run else [out]))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(Path().iterdir()) == before


# ---- starting from an export
@pytest.mark.parametrize("source", ["extras", "exports/extras", "plain", "exports/plain"])
def test_training_starts_where_the_other_run_ended(source):
    name = Path(source).name
    tokenizer = {"data__tokenizer": f"runs/{name}/tokenizer"}
    settings = {**RUNS[name], **tokenizer, **FROZEN, "tokens": 1280}
    run = f"from-{source.replace('/', '-')}"
    summary = train(run=run, init_from=source, **settings)
    before = json.loads(Path(f"runs/{name}/summary.json").read_text())
    assert summary["val_loss"] == pytest.approx(before["val_loss"], abs=1e-5)
    assert summary["val_loss"] < train(run=f"not-{run}", **settings)["val_loss"] - 0.3


@pytest.mark.parametrize("name", RUNS)
def test_training_starts_from_an_export_that_transformers_saved_in_bfloat16(name):
    theirs(name)[0].bfloat16().save_pretrained(f"{name}-bf16")
    theirs(name)[1].save_pretrained(f"{name}-bf16")
    settings = RUNS[name] | FROZEN | {"data__tokenizer": f"runs/{name}/tokenizer"}
    summary = train(run=f"from-{name}-bf16", init_from=f"{name}-bf16", **settings)
    before = json.loads(Path(f"runs/{name}/summary.json").read_text())
    assert summary["val_loss"] == pytest.approx(before["val_loss"], abs=0.01)


def test_a_run_with_other_subwords_starts_from_the_same_function():
    settings = {**RUNS["plain"], "model__subwords": 0, **FROZEN}
    tokenizer = {"data__tokenizer": "exports/plain"}
    summary = train(run="no-subwords", init_from="exports/plain", **settings, **tokenizer)
    before = json.loads(Path("runs/plain/summary.json").read_text())
    assert summary["val_loss"] == pytest.approx(before["val_loss"], abs=1e-5)


def test_a_resumed_run_does_not_need_the_run_it_started_from():
    settings = RUNS["extras"] | {"data__tokenizer": "runs/extras/tokenizer", "save_every": 0.5}
    export_hf.export("extras", Path("start"))
    train(run="child", init_from="start", **settings)
    expected = weights("child")
    shutil.rmtree("start")
    shutil.rmtree(max(Path("runs/child/checkpoints").iterdir()))
    Path("runs/child/summary.json").unlink()
    MODULES["llm"].main(load_config(MODULES["llm"].Config, ["--run=child", "--resume"]))
    assert all(torch.equal(w, expected[name]) for name, w in weights("child").items())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model__canon": 2}, "--init_from exports/extras has model.canon 3.* set --model.canon 3"),
        ({"model__pointer": 0}, "has model.pointer 8, but this run has 0; set --model.pointer 8"),
        ({"model__d_ff": 32}, "set --model.d_ff 64"),
        ({"data__tokenizer": "bpe-301"}, "set --data.tokenizer exports/extras"),
        ({"init_from": "v"}, "--init_from v: runs/v is not a train_llm.py run"),
        ({"init_from": "none"}, "--init_from none: there is no run 'none'"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(changes, message):
    tokenizer = {"data__tokenizer": "runs/extras/tokenizer"}
    settings = RUNS["extras"] | tokenizer | {"init_from": "exports/extras"} | changes
    with pytest.raises(UserError, match=message):
        train(run="refused", data__cache="unused", **settings)
    assert not Path("runs/refused").exists()
    assert not Path("unused/tokens").exists()  # nothing was prepared


def damaged(name: str, **changes) -> None:
    """A copy of exports/plain with changed settings, as the folder `name`."""
    shutil.copytree("exports/plain", name)
    config = json.loads(Path(name, "config.json").read_text())
    Path(name, "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("llama", {"model_type": "llama"}, "model.py has no architecture 'llama'"),
        ("xielu", {"hidden_act": "xielu"}, "model.py has no architecture 'apertus'"),
        ("wider", {"intermediate_size": 128}, "has shape"),
        ("deeper", {"num_hidden_layers": 3}, "lacks blocks.2"),
    ],
)
def test_a_folder_of_another_architecture_is_a_one_line_error(name, changes, message):
    damaged(name, **changes)
    with pytest.raises(UserError, match=message):
        train(run="refused", init_from=name, data__tokenizer="runs/plain/tokenizer", **PLAIN)


def test_a_folder_with_separately_trained_embeddings_is_refused():
    damaged("untied")
    tensors = load_file("untied/model.safetensors")
    tensors["lm_head.weight"][0] += 1
    save_file(tensors, "untied/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="embeddings have been trained separately"):
        train(run="refused", init_from="untied", data__tokenizer="runs/plain/tokenizer", **PLAIN)
