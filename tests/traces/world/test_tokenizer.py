import sentencepiece
from pytest import fixture, raises

from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.traces.world import compact
from distill_jax.traces.world.generate import KINDS, WorldSpec, traces
from distill_jax.traces.world.tokenizer import SPECIALS, build_tokenizer


@fixture(scope="module", params=["compact", "rich"])
def built(request, tmp_path_factory):
    folder = build_tokenizer(tmp_path_factory.mktemp("tok"), request.param)
    return request.param, folder, load_tokenizer(str(folder))


def texts(rendering):
    for kind in KINDS:
        for t in traces(WorldSpec(kind=kind, k=4, rendering=rendering, style="extended"), 15):
            yield from (t.question, t.thinking, t.answer)


def test_specials_and_template(built):
    _, _, tok = built
    for i, special in enumerate(SPECIALS):
        assert tok.encode(special)[0].tolist() == [i]
    assert tok.pad_id == 0 and list(tok.eos_ids) == [2]
    text = tok.prompt_text([{"role": "user", "content": "doc"}])
    assert text == "<user>doc<assistant>"
    text = tok.prompt_text([{"role": "system", "content": "x"}, {"role": "user", "content": "doc"},
                            {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}])
    assert text == "<system>x<user>doc<assistant>a<end><user>b<assistant>"


def test_text_survives_and_matches_sentencepiece(built):
    rendering, folder, tok = built
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    differ = total = 0
    for text in texts(rendering):
        ids, spans = tok.encode(text)
        assert tok.decode(ids) == text
        assert 1 not in ids
        assert spans[-1][1] == len(text.encode())
        total += 1
        differ += ids.tolist() != sp.encode(text)
    # Unigram ties between equally probable splits may fall either way; words cannot.
    assert differ <= (0 if rendering == "compact" else total // 100)


def test_one_symbol_one_token(built):
    rendering, _, tok = built
    if rendering == "compact":
        for word in compact.vocabulary():
            assert len(tok.encode(word)[0]) == 1
        assert tok.real == len(compact.vocabulary()) + len(SPECIALS) < 300
        ids = tok.encode("<think> anna lives oslo </think>\n\noslo<end>")[0]
        assert tok.decode(ids).split() == ["<think>", "anna", "lives", "oslo</think>", "oslo<end>"]
        assert len(ids) == 7
    else:
        used = {int(i) for text in texts(rendering) for i in tok.encode(text)[0]}
        assert tok.real >= 2000 and len(used) > 1200


def test_same_bytes_every_time(built, tmp_path):
    rendering, folder, _ = built
    again = build_tokenizer(tmp_path, rendering)
    for file in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (again / file).read_bytes() == (folder / file).read_bytes()


def test_unknown_rendering(tmp_path):
    with raises(ValueError, match="compact"):
        build_tokenizer(tmp_path, "plain")
