"""`load_tokenizer(source)`: one object for every tokenizer a model may come with.

Ids are compared over *real* ids: padding a head to a round size (151,936 or 152,064 rows for the 151,665 ids of
Qwen2.5) changes nothing here.
"""

import gzip
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from distill_jax.data.backends import Backend, FastBackend, PieceBackend
from distill_jax.data.chat import ChatTemplate, Message, builtin_template, read_template
from distill_jax.traces.store.kv import Kv

PROBE = ("Hello  world\n\n\tI'll pay 1234567.89 now: \u00e9\u0301 \u4f60\u597d \U0001f999 don't CAN'T\r\n"
         "   x = {'a': [1, 2]} \u2581\u00bd\ufb01 $\\frac{1}{2}$ <think>\n</think>\n\n")
"""Text whose ids tell normalisers, pre-tokenizers and merges apart."""

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
         "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json", "config.json",
         "tokenizer.model")


class Tokenizer:
    """Text to ids and back, with the byte span of every token, and the chat template.

    real       number of real ids, added tokens included
    hash       identity of the encoding: id -> content of every real id, and the ids of a probe text
    base_hash  the same over the learned vocabulary only, without added tokens
    name       the source as it was given: loads the tokenizer again
    bos_id, pad_id, eos_ids   None where there is none; eos_ids[0] ends an assistant turn
    chat       `ChatTemplate`
    """

    def __init__(self, backend: Backend, config: Mapping[str, Any], template: str, name: str) -> None:
        self.backend = backend
        self.config = dict(config)
        self.name = name
        self.real = len(backend.pieces)
        self._bos, self._eos, self._pad = (_content(config.get(f"{k}_token")) for k in ("bos", "eos", "pad"))
        variables = {f"{k}_token": v for k, v in (("bos", self._bos), ("eos", self._eos), ("pad", self._pad)) if v}
        self.chat = ChatTemplate(template, variables, [*backend.added, *variables.values()])

    def __repr__(self) -> str:
        return f"Tokenizer({self.name}, real={self.real}, hash={self.hash})"

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {p: i for i, p in enumerate(self.backend.pieces)}

    def id_of(self, content: str | None) -> int | None:
        """Id of a token given its content; None when there is none."""
        return None if not content else self.backend.added.get(content, self._ids.get(content))

    @property
    def bos_id(self) -> int | None:
        return self.id_of(self._bos)

    @property
    def pad_id(self) -> int | None:
        return self.id_of(self._pad)

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end generation: the template's turn end first, then the tokenizer's and generation config's."""
        out: list[int] = []
        if self.chat.turn_end:
            out.append(int(self.encode(self.chat.turn_end)[0][-1]))
        listed = self.config.get("generation_eos", [])
        for token in [self.id_of(self._eos), *listed]:
            if token is not None and token < self.real and token not in out:
                out.append(int(token))
        return tuple(out)

    def encode(self, text: str, *, continues: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """ids int32 [T] and byte spans int32 [T,2], a partition of the text's UTF-8 bytes (`data.spans`).

        Special tokens written in the text are recognised; none are added. `continues`: the text stands behind
        another one, so a blank it starts with is the one a sentencepiece model would put there by itself.
        """
        if continues and self.adds_blank and text.startswith(" "):
            ids, spans = self.backend.encode(text[1:])
            spans = spans + 1
            if len(spans):
                spans[0, 0] = 0
            return ids, spans.astype(np.int32)
        return self.backend.encode(text)

    def encode_many(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """`encode` of many texts; byte-level tokenizers use all cores unless TOKENIZERS_PARALLELISM is false."""
        return self.backend.encode_many(texts)

    @cached_property
    def adds_blank(self) -> bool:
        """Whether a blank that is not in the text is put before it, and behind added tokens (sentencepiece)."""
        first = self.backend.encode("a")[0]
        return len(first) > 0 and self.backend.token_bytes(int(first[0])).startswith(b" ")

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids, special tokens written out. Ids outside the real ones show as `<id?>`."""
        ids = [int(i) for i in ids]
        if all(0 <= i < self.real for i in ids):
            return self.backend.decode(ids)
        out, run = [], []
        for i in [*ids, None]:
            if i is not None and 0 <= i < self.real:
                run.append(i)
                continue
            out.append(self.backend.decode(run) if run else "")
            out.append("" if i is None else f"<{i}?>")
            run = []
        return "".join(out)

    def token_bytes(self, token: int) -> bytes:
        """Bytes the token stands for (the content of an added token)."""
        return self.backend.token_bytes(int(token))

    @cached_property
    def base_hash(self) -> str:
        added = set(self.backend.added.values())
        return _digest([f"{i} {p}" for i, p in enumerate(self.backend.pieces) if i not in added])

    @cached_property
    def hash(self) -> str:
        probe = self.backend.encode(PROBE)[0].tolist()
        return _digest([*self.backend.pieces, json.dumps(probe)])

    def info(self) -> dict[str, Any]:
        """What a store keeps of its tokenizer (JSON): enough to compare it with another one, see `same_real_ids`."""
        return {"name": self.name, "hash": self.hash, "base_hash": self.base_hash, "real": self.real,
                "added": dict(self.backend.added), "bos": self.bos_id, "eos": list(self.eos_ids), "pad": self.pad_id,
                "turn_end": self.chat.turn_end, "template_id": self.chat.id, "chat_template": self.chat.text}

    def render(self, messages: Sequence[Message], *, generation_prompt: bool, **kwargs: Any) -> str:
        """The conversation as the chat template writes it."""
        return self.chat.render(messages, generation_prompt=generation_prompt, **kwargs)

    def prompt_text(self, messages: Sequence[Message], **kwargs: Any) -> str:
        """The template's generation prompt: what the model sees before it writes."""
        return self.chat.render(messages, generation_prompt=True, **kwargs)

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load_tokenizer` and transformers read."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        self.backend.save(path)
        config = {k: v for k, v in self.config.items() if k != "generation_eos"} | {"chat_template": self.chat.text}
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        (path / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False))


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, Mapping) else token


def _digest(parts: Sequence[str]) -> str:
    h = hashlib.blake2b(digest_size=12)
    for part in parts:
        h.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return h.hexdigest()


def same_real_ids(a: "Tokenizer | Mapping[str, Any]", b: "Tokenizer | Mapping[str, Any]") -> list[str]:
    """What differs between two tokenizers (or their `info()`), one line each; empty when every real id means the same
    in both. How far a head is padded is not looked at."""
    x, y = (t.info() if isinstance(t, Tokenizer) else t for t in (a, b))
    if x["hash"] == y["hash"]:
        return []
    out = []
    if x["real"] != y["real"]:
        out.append(f"number of real ids: {x['real']:,} ({x['name']}) against {y['real']:,} ({y['name']})")
    if x["base_hash"] != y["base_hash"]:
        out.append("the learned vocabularies differ")
    by_id = [{i: s for s, i in t["added"].items()} for t in (x, y)]
    for i in sorted(set(by_id[0]) | set(by_id[1])):
        left, right = (t.get(i) for t in by_id)
        if left != right:
            out.append(f"id {i}: {left!r} against {right!r}")
    return out or ["same ids, but the texts are split or normalised differently"]


def load_tokenizer(source: "str | Path | Tokenizer", *, chat_template: str | Path | None = None) -> Tokenizer:
    """A tokenizer from a Hugging Face directory (files may be gzipped), a run directory (its `model/`), a `gs://` or
    `s3://` URL of either, a raw sentencepiece model file, or a hub id.

    chat_template: a Jinja file, or the name of a built-in template, instead of the source's own. Without either:
    `mistral_v3` for a sentencepiece model with Mistral's control pieces, else `plain`.
    Raises ValueError when nothing there is a tokenizer, or when the hub cannot be reached.
    """
    if isinstance(source, Tokenizer):
        return source
    if "://" in str(source):
        with tempfile.TemporaryDirectory() as temp:
            _fetch(str(source), Path(temp))
            return _from_folder(Path(temp), str(source), chat_template)
    path = Path(source).expanduser()
    if path.is_file():
        return _from_file(path, chat_template)
    folder = _model_folder(path) if path.is_dir() else _download(str(source))
    return _from_folder(folder, str(source), chat_template)


def _model_folder(path: Path) -> Path:
    """Where the tokenizer lies: in `model/` of a run, of its last training stage if it has several; else here."""
    final = _read_json(path, "run.json").get("final", "")
    below = path / final / "model"
    return below if below.is_dir() else path


def _fetch(url: str, into: Path) -> None:
    """The tokenizer files of a URL into a folder."""
    remote = Kv(url)
    run = remote.read("run.json")
    final = json.loads(run).get("final", "") if run else ""
    names = [name + end for name in FILES for end in ("", ".gz")]
    for below in dict.fromkeys((f"{final}/model/" if final else "model/", "")):
        for name, content in zip(names, remote.read_many(below + name for name in names)):
            if content is not None:
                (into / name).write_bytes(content)
        if any(into.iterdir()):
            return
    raise ValueError(f"no tokenizer at {url}: none of {', '.join(FILES[:5])} is there or in model/")


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if not looks_like_path:
        try:
            return Path(snapshot_download(name, allow_patterns=[*FILES, "*.tiktoken"]))
        except Exception as e:  # the hub client raises a dozen kinds
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise ValueError(f"no tokenizer {name!r}: it is not a local directory or file, and the hub did not give "
                             f"it ({reason}). Offline, download it elsewhere and pass its directory.") from None
    raise ValueError(f"no tokenizer at {name!r}: there is no such directory or file")


def _from_file(path: Path, chat_template: str | Path | None) -> Tokenizer:
    raw = path.read_bytes()
    if raw[:1] == b"{":
        fast = FastBackend(_parse_fast(raw.decode(), path))
        return Tokenizer(fast, {}, _template_for(fast, {}, chat_template), str(path))
    backend = _sentencepiece(raw, path)
    return Tokenizer(backend, _piece_config(backend), _template_for(backend, {}, chat_template), str(path))


def _parse_fast(text: str, path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as e:  # the Rust side raises bare Exception
        raise ValueError(f"{path} is not a tokenizer.json: {e}") from None


def _sentencepiece(proto: bytes, path: Path) -> PieceBackend:
    try:
        return PieceBackend(proto)
    except Exception as e:  # RuntimeError or worse from the C++ side
        raise ValueError(f"{path} is not a sentencepiece model: {str(e).splitlines()[0]}. A Hugging Face tokenizer "
                         f"is given by its directory.") from None


def _piece_config(backend: PieceBackend) -> dict[str, Any]:
    model = backend.model
    ids = {"bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id()}
    return {f"{k}_token": backend.pieces[i] for k, i in ids.items() if i >= 0}


def _template_for(backend: Backend, config: Mapping[str, Any], override: str | Path | None) -> str:
    if override is not None:
        return read_template(override)
    own = config.get("chat_template")
    if isinstance(own, list):  # several named templates
        own = next((t["template"] for t in own if t.get("name") == "default"), own[0]["template"] if own else None)
    if own:
        return str(own)
    mistral = isinstance(backend, PieceBackend) and {"[INST]", "[TOOL_CALLS]"} <= set(backend.added)
    return builtin_template("mistral_v3" if mistral else "plain")


def _read(folder: Path, name: str) -> str | None:
    """Text of a file, or of its gzip; None when there is neither."""
    if (folder / name).is_file():
        return (folder / name).read_text()
    if (folder / f"{name}.gz").is_file():
        return gzip.decompress((folder / f"{name}.gz").read_bytes()).decode()
    return None


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    text = _read(folder, name)
    try:
        return json.loads(text) if text else {}
    except ValueError as e:
        raise ValueError(f"{folder / name} is not JSON: {e}") from None


def _from_folder(folder: Path, name: str, chat_template: str | Path | None) -> Tokenizer:
    config = _read_json(folder, "special_tokens_map.json") | {
        k: v for k, v in _read_json(folder, "tokenizer_config.json").items() if v is not None}
    template = _read(folder, "chat_template.jinja") or _read_json(folder, "chat_template.json").get("chat_template")
    if template:
        config["chat_template"] = template
    if (folder / "tokenizer.model").is_file() and _read(folder, "tokenizer.json") is None:
        backend: Backend = _sentencepiece((folder / "tokenizer.model").read_bytes(), folder)
        config = _piece_config(backend) | config
    else:
        fast = _fast(folder)
        backend = FastBackend(_with_added(fast, config.get("added_tokens_decoder") or {}))
        if "eos_token" not in config and isinstance(fast, tokenizers.Tokenizer) and "<|endoftext|>" in backend.added:
            config |= {"eos_token": "<|endoftext|>"}
    listed = _read_json(folder, "generation_config.json").get("eos_token_id", [])
    config["generation_eos"] = [listed] if isinstance(listed, int) else list(listed or [])
    return Tokenizer(backend, config, _template_for(backend, config, chat_template), name)


def _fast(folder: Path) -> tokenizers.Tokenizer:
    """tokenizer.json as it stands, or the transformers class the folder names, on vocab.json and merges.txt."""
    text = _read(folder, "tokenizer.json")
    if text is not None:
        return _parse_fast(text, folder / "tokenizer.json")
    if _read(folder, "vocab.json") is None or _read(folder, "merges.txt") is None:
        have = sorted(p.name for p in folder.iterdir())
        raise ValueError(f"no tokenizer in {folder}: looked for tokenizer.json, vocab.json with merges.txt, or "
                         f"tokenizer.model (the first three also as .gz); it holds {have}")
    import transformers

    with tempfile.TemporaryDirectory() as temp:
        for file in FILES:
            if (content := _read(folder, file)) is not None and file != "tokenizer.model":
                (Path(temp) / file).write_text(content)
        named = (Path(temp) / "tokenizer_config.json").is_file() or (Path(temp) / "config.json").is_file()
        cls = transformers.AutoTokenizer if named else transformers.GPT2Tokenizer
        try:
            return cls.from_pretrained(temp).backend_tokenizer
        except Exception as e:
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise ValueError(f"transformers cannot load the tokenizer in {folder}: {reason}") from None


def _with_added(backend: tokenizers.Tokenizer, declared: Mapping[str, Mapping[str, Any]]) -> tokenizers.Tokenizer:
    """Add the tokens that only tokenizer_config.json declares, in the order of their ids."""
    known = {t.content for t in backend.get_added_tokens_decoder().values()}
    for token_id, token in sorted(declared.items(), key=lambda kv: int(kv[0])):
        if token["content"] in known:
            continue
        flags = {k: bool(token.get(k, False)) for k in ("lstrip", "rstrip", "single_word", "normalized")}
        added = tokenizers.AddedToken(token["content"], special=bool(token.get("special", False)), **flags)
        (backend.add_special_tokens if token.get("special") else backend.add_tokens)([added])
        if backend.token_to_id(token["content"]) != int(token_id):
            raise ValueError(f"tokenizer_config.json puts {token['content']!r} at id {token_id}, but the vocabulary "
                             f"ends at {backend.token_to_id(token['content'])}: files of two tokenizers are mixed")
    return backend
