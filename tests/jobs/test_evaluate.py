"""`distill-jax eval` from the command line: model folders and a server, the report, and going on after a stop."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import jax
import pytest

from distill_jax.cli.main import main
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.jobs.evaluate import Asking, evaluate, make_task, names_for, reads_text, training_costs
from distill_jax.models import hf
from distill_jax.models.config import AttentionConfig, ModelConfig
from distill_jax.models.transformer import Transformer, init_params
from distill_jax.traces.world.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two tiny models with the compact tokenizer, as Hugging Face directories."""
    root = tmp_path_factory.mktemp("models")
    files = list(build_tokenizer(root / "tok", "compact").iterdir())
    tok = load_tokenizer(str(root / "tok"))
    config = ModelConfig(vocab_size=tok.real, hidden_size=16, mlp_size=16, num_layers=1, num_heads=2, num_kv_heads=2,
                         head_dim=8, context_length=48, attention=AttentionConfig(qkv_bias=True))
    for i, name in enumerate(("a", "b")):
        model = Transformer(config)
        hf.save(root / name, model, init_params(model, jax.random.key(i)), files)
    return root


def cli(*args):
    with pytest.raises(SystemExit) as e:
        main(["eval", *map(str, args)])
    return int(e.value.code or 0)


def test_two_models_from_the_command_line(folders, tmp_path, capsys):
    args = [folders / "a", folders / "b", "--k", "2,4", "--questions", "4", "--max-new-tokens", "8", "--out",
            tmp_path / "r", "--set", "positions=2"]
    assert cli(*args) == 0
    value = json.loads((tmp_path / "r/report.json").read_text())
    assert set(value["students"]) == {"base", "distilled"} and set(value["difference"]) == {"2", "4"}
    base = value["students"]["base"]
    assert base["questions"] == 8 and base["answers"] == 16 and base["source"] == str(folders / "a")
    assert {p.name for p in (tmp_path / "r").glob("*.png")} >= {"position_curves.png", "heat_map.png"}
    assert "distilled" in capsys.readouterr().out
    kept = (tmp_path / "r/records/base.json").read_bytes()
    assert cli(*args) == 0
    assert "kept from before" in capsys.readouterr().out and (tmp_path / "r/records/base.json").read_bytes() == kept
    assert json.loads((tmp_path / "r/report.json").read_text()) == value
    (tmp_path / "r/records/distilled.json").unlink()
    assert cli(*args) == 0 and "kept from before" in capsys.readouterr().out
    assert cli(*[a if a != "4" else "3" for a in args]) == 0 and "kept" not in capsys.readouterr().out


def test_prompts_beyond_the_context_are_counted(folders, tmp_path):
    task = make_task("multidoc_qa", {"k": [2, 12], "questions": 2, "positions": 1}, [str(folders / "a")])
    value = evaluate({"a": str(folders / "a")}, task, tmp_path, Asking(max_new_tokens=4), say=lambda line: None)
    assert value["students"]["a"]["over_long"] == 0.5, "12 documents are 54 tokens, the context 48"


def test_rendering_follows_the_tokenizer(folders, tmp_path):
    assert make_task("conflicts", {}, [str(folders / "a")]).rendering == "compact"
    assert make_task("conflicts", {}, ["http://host/v1#m"]).rendering == "rich"
    assert make_task("conflicts", {"rendering": "rich"}, [str(folders / "a")]).rendering == "rich"
    assert reads_text(load_tokenizer(str(build_tokenizer(tmp_path, "rich"))))


def test_names_and_costs(tmp_path, folders):
    assert names_for(["x", "y"]) == ["base", "distilled"]
    assert names_for(["runs/m"]) == ["m"] and names_for(["a/m", "b/m", "http://h/v1#q/z"]) == ["m", "m-2", "z"]
    assert training_costs(str(folders / "a")) == {} == training_costs("http://h/v1")
    for file in (folders / "a").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "done.json").write_text(json.dumps({"seconds": 12.34, "result": {"flops": 5, "steps": 1}}))
    assert training_costs(str(tmp_path)) == {"training_seconds": 12.3, "training_flops": 5.0}


@pytest.mark.parametrize(("args", "says"), [
    (["--task", "nope"], "known:"), (["--k", "2;4"], "--k takes numbers"), (["--set", "x"], "name=value"),
    (["--set", "nope=1"], "no field 'nope'"), (["--names", "a,b"], "2 names|different names"),
    (["--task", "answer_match"], "--data FILE"), (["--data", "/not/here"], "not/here"), (["--k", "99"], "rich"),
])
def test_bad_arguments_are_one_line(folders, tmp_path, capsys, args, says):
    assert cli(folders / "a", "--out", tmp_path / "r", *args) == 2
    err = capsys.readouterr().err
    assert re.search(says, err) and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "r/report.json").exists()


def test_no_such_model(tmp_path, capsys):
    assert cli(tmp_path / "nothing", "--out", tmp_path / "r") == 2
    assert "no such directory" in capsys.readouterr().err


class Server(BaseHTTPRequestHandler):
    def _send(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self._send({"data": [{"id": "served"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        asked, _ = re.search(r"What is (\d+ \+ \d+)(.*)", question).groups()
        self._send({"choices": [{"message": {"content": f"<think>easy</think>It is {eval(asked)}."}}],
                    "usage": {"completion_tokens": 9}})

    def log_message(self, *args):
        pass


def test_server_on_answer_match(tmp_path, capsys):
    data = tmp_path / "q.jsonl"
    rows = [{"question": f"What is {i} + 2?", "answer": f"Adding.\n#### {i + 2 + (i == 3)}"} for i in range(4)]
    data.write_text("\n".join(map(json.dumps, rows)))
    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        assert cli(url, "--task", "answer_match", "--data", data, "--out", tmp_path / "r") == 0
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    value = json.loads((tmp_path / "r/report.json").read_text())
    (summary,) = value["students"].values()
    assert summary["accuracy"] == 0.75 and summary["tokens"] == 9 and summary["thinking_tokens"] > 0
