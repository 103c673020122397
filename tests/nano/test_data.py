"""nano's text, tokenizer, woven tasks and batches.

The corpus here is made up; the tokenizer is the committed one.
"""

import re
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsim.errors import FmsimError
from fmsim.exec.runs.stream import exact
from fmsim.nano import prompts, tokens, weaving, words
from fmsim.nano import tokenizer as bpe
from fmsim.nano import wording as say
from fmsim.nano.text import extract, pack_tokens
from fmsim.nano.text.corpus import (
    Document,
    is_english,
    is_held_out,
    read_documents,
    write_documents,
)
from fmsim.nano.training import batches

SUBJECTS = [
    "The engine",
    "A clerk",
    "My neighbour",
    "This table",
    "Her letter",
    "The kernel",
    "Some index",
    "One page",
]
VERBS = ["reads", "forgets", "moves", "keeps", "returns", "measures", "opens", "describes"]
OBJECTS = [
    "the old house.",
    "a long list.",
    "every line of it.",
    "his coat.",
    "two of them.",
    "the cache.",
    "nothing at all.",
    "a garden.",
]


def made_up_text(seed: int, sentences: int) -> str:
    rng = np.random.default_rng(seed)
    picks = rng.integers(8, size=(sentences, 3))
    numbers = rng.integers(1000, size=sentences)
    return " ".join(
        f"{SUBJECTS[a]} {VERBS[b]} {OBJECTS[c]} {n}\n" for (a, b, c), n in zip(picks, numbers)
    )


@pytest.fixture(scope="module")
def corpus() -> tokens.Corpus:
    return tokens.from_texts({f"made up/{seed}": made_up_text(seed, 1500) for seed in range(4)})


def decoded(ids) -> str:
    return bpe.load().decode([int(i) for i in ids], skip_special_tokens=False)


def answer_spans(answer: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], answer.astype(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def values_told(before: str, key: str) -> list[str]:
    return re.findall(rf"(?:The|the) magic number for {re.escape(key)} is (\d+)\.", before)


def in_any_order(answer: str) -> str:
    """Several values are right in any order: sorted, where there are several."""
    listed = re.fullmatch(r"\d+(, \d+)+\.", answer)
    return ", ".join(sorted(answer[:-1].split(", "))) + "." if listed else answer


def expected_answer(before: str) -> str:
    """Read the text up to an answer as a person would, and answer."""
    *earlier, question = re.split(r"\nQuestion: |\nUser: (?=What is my)", before)
    # without answers already given
    told = "\n".join(re.sub(r"^[^\n]*\? Answer:[^\n]*\n", "", part) for part in earlier)
    if found := re.match(r"What is the magic number for (.+?)\?", question):
        return values_told(told, found[1])[0] + "."
    if found := re.match(r"What are all the magic numbers for (.+?)\?", question):
        return in_any_order(", ".join(values_told(told, found[1])) + ".")
    if found := re.match(r"What are the magic numbers for (.+?)\?", question):
        keys = re.split(r", | and ", found[1])
        sentences = " ".join(
            f"The magic number for {key} is {values_told(told, key)[0]}." for key in keys
        )
        return sentences.removeprefix(f"The magic number for {keys[0]} is ")
    if found := re.match(r"Which variables have the value (\d+)\?", question):
        chain = re.findall(rf"VAR ([A-Z]+) = {found[1]}\.", told)[:1]
        while more := re.findall(rf"VAR ([A-Z]+) = VAR {chain[-1]}\.", told):
            chain.append(more[0])
        return " " + ", ".join(chain) + "."
    if found := re.match(r"What is my (.+?) code\?", question):
        return re.findall(rf"My {found[1]} code is (\d+)\.", told)[0] + "."
    raise AssertionError(f"no question in {question!r}")


@pytest.mark.parametrize(
    "kind", ["dense", "sparse", "mixed", "memory", "hops", "chained", "valued", "tracking"]
)
@pytest.mark.parametrize("length", [513, 1025, 4096])
def test_every_answer_is_where_the_mask_says_and_follows_from_earlier_text(corpus, kind, length):
    checked = 0
    for seed in range(4):
        sample = weaving.pack_sequence(
            np.random.default_rng(seed), length, corpus, mixture=weaving.Mixture({kind: 1.0})
        )
        assert len(sample.tokens) == len(sample.answer) == length and sample.tokens[0] == bpe.BOS_ID
        for start, end in answer_spans(sample.answer):
            before = decoded(sample.tokens[:start])
            if "earlier text go on" in before.rsplit("\nQuestion:", 1)[-1]:
                quote = sample.tokens[start - 8 : end]
                assert len(weaving._finds(sample.tokens[: start - 8], quote)) >= 1
            elif end < length:
                assert in_any_order(decoded(sample.tokens[start:end])) == expected_answer(before)
            checked += 1
    assert checked >= 4


def test_updates_ask_for_what_was_told_last(corpus):
    asked = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        sample = weaving.pack_sequence(rng, 4096, corpus, mixture=weaving.Mixture({"update": 1.0}))
        told, pieces = {}, decoded(sample.tokens)
        for line in pieces.split("\n"):
            said = line.split()
            if line.startswith("User: My ") and " code is " in line:
                told[said[2]] = said[5]
            if line.startswith("Assistant: Your ") and " code is " in line:
                assert told[said[2]] == said[5]
                asked += 1
    assert asked > 10


def test_dense_sequences_carry_the_recipe(corpus):
    sample = weaving.pack_sequence(np.random.default_rng(0), 4096, corpus, mixture="dense")
    text = decoded(sample.tokens)
    questions = text.count("Question:")
    assert questions == 32
    assert len(re.findall(r"[Tt]he magic number for [^?]*? is \d+\.", text)) - questions == 16


def test_text_between_the_inserts_is_the_corpus_unchanged(corpus):
    rng = np.random.default_rng(5)
    told = [
        say.fact(rng, place, *item)
        for place, item in zip((0.2, 0.7), [([500], [18, 19, 20, 21]), ([501], [22, 23, 24, 25])])
    ]
    woven = weaving.weave(rng, corpus, 2000, told)
    plain = woven.tokens[1:].tolist()
    for item in told:
        size = len(item.tokens)
        place = next(i for i in range(len(plain)) if plain[i : i + size] == item.tokens)
        del plain[place : place + size]
    twice = np.concatenate([corpus.tokens, corpus.tokens])
    assert len(weaving._finds(twice, np.array(plain, np.uint16))) >= 1


@pytest.mark.parametrize("mixture", list(weaving.MIXTURES))
def test_a_seed_gives_one_sequence(corpus, mixture):
    first, again, other = (
        weaving.pack_sequence(np.random.default_rng(s), 1024, corpus, mixture=mixture)
        for s in (1, 1, 2)
    )
    assert all(
        np.array_equal(getattr(first, part), getattr(again, part))
        for part in ("tokens", "answer", "positions")
    )
    assert not np.array_equal(first.tokens, other.tokens)


def test_batches_do_not_depend_on_the_workers(corpus):
    streams = [
        iter(batches.stream_batches(corpus, 512, 2, "all", seed=3, start=s, workers=w))
        for s, w in ((0, 0), (0, 2), (2, 0))
    ]
    alone = [next(streams[0]) for _ in range(4)]
    shared = [next(streams[1]) for _ in range(4)]
    resumed = [next(streams[2]) for _ in range(2)]
    for one, two in zip(alone + alone[2:], shared + resumed):
        assert all(bool((a == b).all()) for a, b in zip(one, two))
    given_tokens, weights, positions = alone[0]
    assert given_tokens.shape == (2, 513) and weights.shape == positions.shape == (2, 512)


def test_weights_mark_the_predicted_answer_tokens(corpus):
    set_of_batches = batches.Batches(corpus, 512, 1, "dense", seed=0)
    given_tokens, weights, _ = set_of_batches[0]
    sample = weaving.pack_sequence(np.random.default_rng((0, 0)), 513, corpus, mixture="dense")
    assert given_tokens[0].tolist() == sample.tokens.tolist()
    assert given_tokens[0, 1:][weights[0] > 0].tolist() == sample.tokens[sample.answer].tolist()


@given(st.integers(0, 2**32 - 1), st.integers(1, 3000), st.integers(0, 700_000))
def test_positions_rise_and_jump_by_whole_blocks_between_blocks(seed, length, spare):
    positions = weaving.skipping_positions(np.random.default_rng(seed), length, length + spare)
    steps = np.diff(positions)
    jumps = np.flatnonzero(steps != 1)
    assert len(positions) == length and positions[0] == 0 and (steps >= 1).all()
    assert ((jumps + 1) % 128 == 0).all() and ((steps[jumps] - 1) % 128 == 0).all()
    assert positions[-1] < length + spare + (spare == 0)


def test_skipping_mixtures_reach_far(corpus):
    samples = [
        weaving.pack_sequence(np.random.default_rng(s), 1024, corpus, mixture="lessons")
        for s in range(40)
    ]
    ends = np.array([sample.positions[-1] for sample in samples])
    assert (ends == 1023).any() and ends.max() > 400_000 and ends.max() < 1_040_000


def test_training_and_evaluation_share_no_word_and_no_name():
    train, evaluation = say.Wording(False), say.Wording(True)
    for part in ("nouns", "adjectives", "names"):
        ours, theirs = ({tuple(item) for item in getattr(w, part)} for w in (train, evaluation))
        assert len(ours) > 500 and len(theirs) > 200 and not ours & theirs
    assert not {w for listed in words.load(False).values() for w in listed} & {
        w for listed in words.load(True).values() for w in listed
    }


@pytest.mark.parametrize("kind", list(prompts.TASKS))
@pytest.mark.parametrize("length", [600, 3000])
def test_prompts_have_the_length_asked_and_hold_their_answer(corpus, kind, length):
    for seed in range(3):
        prompt = prompts.evaluation_prompt(kind, length, np.random.default_rng(seed), corpus)
        assert len(prompt.tokens) == length
        assert prompts.score(prompt.references, prompt.answer) == 1.0 and exact(
            prompt.answer, [*prompt.answer, 7]
        )
        if kind == "early_text":
            assert (
                len(
                    weaving._finds(
                        prompt.tokens[:-12], np.concatenate([prompt.tokens[-12:], prompt.answer])
                    )
                )
                == 1
            )
        else:
            assert in_any_order(decoded(prompt.answer)) == expected_answer(decoded(prompt.tokens))


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_depth_places_the_needle(corpus, depth):
    prompt = prompts.evaluation_prompt("single", 2000, np.random.default_rng(1), corpus, depth)
    text = decoded(prompt.tokens)
    assert text.index(prompt.references[0]) / text.rindex("\nQuestion") == pytest.approx(
        depth, abs=0.06
    )


def test_score_is_the_share_of_references_and_exact_is_strict():
    generated = bpe.load().encode(" 123, 456 and VAR abcde").ids
    assert prompts.score(["123", "999"], generated) == 0.5
    assert prompts.score(["ABCDE"], generated) == 1.0
    assert not exact([5, 6], [5, 7]) and not exact([5, 6], [5]) and exact([5, 6], [5, 6, 7])


@pytest.mark.parametrize("kind", list(prompts.STREAMS))
def test_streams_ask_only_what_was_told(corpus, kind):
    stream = prompts.decode_stream(kind, 4096, np.random.default_rng(2), corpus, steps=512)
    assert len(stream.prompt) == 4096 and stream.steps >= 512
    so_far = stream.prompt.tolist()
    for turn in stream.turns:
        so_far += turn.forced
        assert turn.generate == len(turn.answer)
        if turn.generate:
            assert decoded(turn.answer) == expected_answer(decoded(so_far))
            assert prompts.score(list(turn.references), turn.answer) == 1.0
        so_far += turn.answer
    asked = sum(turn.generate > 0 for turn in stream.turns)
    assert asked == 0 if kind == "continuation" else asked >= 5


def test_continuation_stream_is_unbroken_text(corpus):
    stream = prompts.decode_stream(
        "continuation", 1000, np.random.default_rng(0), corpus, steps=300
    )
    run = np.concatenate([stream.prompt[1:], np.array(stream.turns[0].forced, np.uint16)])
    assert len(weaving._finds(np.concatenate([corpus.tokens] * 2), run)) >= 1


@settings(max_examples=200)
@given(st.text())
def test_tokenizer_gives_any_text_back(text):
    assert bpe.load().decode(bpe.load().encode(text).ids, skip_special_tokens=False) == text


@given(st.integers(0, 10**12))
def test_each_digit_is_a_token(number):
    pieces = bpe.load().encode(f"is {number}.").tokens
    assert [piece for piece in pieces if piece.isdigit()] == list(str(number))


def test_woven_questions_are_what_the_tokenizer_would_give():
    rng, chosen = np.random.default_rng(0), say.Wording(True)
    keys, values, names = (
        chosen.keys(rng, 12),
        [chosen.value(rng) for _ in range(4)],
        chosen.some_names(rng, 4),
    )
    lines = [say.ask(0, key, values[0]) for key in keys]
    lines += [
        say.ask_all(0, keys[0], values),
        say.ask_each(0, keys[:4], values),
        say.ask_names(0, values[0], names),
    ]
    lines += [say.recall(0, noun, values[1]) for noun in chosen.some_nouns(rng, 8)] + [
        say.session(0, 37, 500),
        say.assign(0, names[0], None, names[1]),
    ]
    lines += [say.fact(rng, 0, key, values[2]) for key in keys]
    for line in lines:
        assert bpe.load().encode(decoded(line.tokens)).ids == line.tokens


def test_transformers_loads_the_tokenizer():
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(bpe.MODEL_FOLDER)
    assert (len(loaded), loaded.bos_token_id, loaded.eos_token_id) == (4096, 0, 1)
    assert loaded("The key is 42.")["input_ids"] == bpe.load().encode("The key is 42.").ids


def test_too_short_a_sequence_and_unknown_names_are_told(corpus):
    rng = np.random.default_rng(0)
    with pytest.raises(FmsimError, match="too few"):
        weaving.pack_sequence(rng, 600, corpus, density=9.0, mixture="dense")
    with pytest.raises(FmsimError, match="dense, all"):
        weaving.pack_sequence(rng, 600, corpus, mixture="densest")
    with pytest.raises(FmsimError, match="single"):
        prompts.evaluation_prompt("riddle", 600, rng, corpus)
    with pytest.raises(FmsimError, match="needles"):
        prompts.decode_stream("riddle", 600, rng, corpus)


def test_documents_and_tokens_survive_the_disk(tmp_path):
    documents = [Document("p", "1", "MIT", f"d{i}", i == 0, made_up_text(i, 20)) for i in range(3)]
    sizes = write_documents(iter(documents), tmp_path / "documents.jsonl.xz")
    assert sizes == {"p": sum(len(d.text) for d in documents)}
    again = list(read_documents(tmp_path))
    assert again == documents
    counts = pack_tokens.save(again, tmp_path)
    train, held_out = tokens.load(tmp_path, "train"), tokens.load(tmp_path, "held_out")
    assert {"train": len(train.tokens), "held_out": len(held_out.tokens)} == counts
    assert held_out.names == ["p/d0"] and sorted(train.names) == ["p/d1", "p/d2"]
    for number, name in enumerate(train.names):
        start, end = train.documents[number], train.documents[number + 1]
        assert train.tokens[end - 1] == bpe.EOS_ID
        assert decoded(train.tokens[start : end - 1]) == documents[int(name[-1])].text


def test_missing_or_foreign_token_files_are_told(tmp_path):
    with pytest.raises(FmsimError, match="train.xz: missing"):
        tokens.load(tmp_path, "train")
    documents = [Document("p", "1", "MIT", f"d{i}", i == 0, made_up_text(i, 20)) for i in range(2)]
    pack_tokens.save(documents, tmp_path)
    whole = (tmp_path / "train.xz").read_bytes()
    (tmp_path / "train.xz").write_bytes(whole[:-8])
    with pytest.raises(FmsimError, match="train.xz: truncated"):
        tokens.load(tmp_path, "train")
    (tmp_path / "train.xz").write_bytes((tmp_path / "held_out.xz").read_bytes())
    with pytest.raises(FmsimError, match="documents.json tells of"):
        tokens.load(tmp_path, "train")


def test_html_keeps_the_text_and_drops_the_page_furniture():
    page = """<html><head><title>T</title><style>p {}</style></head>
    <body><div class="sphinxsidebar"><div>Menu</div></div>
    <h1>Caches<a class="headerlink">&para;</a></h1><p>A  cache is
    <b>small</b> &amp; fast.<br>It forgets.</p><pre>a  =  1
b</pre><script>x()</script><ul><li>one<li>two</ul></body></html>"""
    assert (
        extract.html_text(page)
        == "Caches\n\nA cache is small & fast.\nIt forgets.\n\na  =  1\nb\n\none\ntwo\n"
    )


def test_pod_becomes_text():
    page = (
        "=encoding utf8\n\n=head1 NAME\n\n=over 4\n\n=item B<open>\n\nSee L<close|perlfunc/close>"
        " or C<< $a->b >>, I<C<x E<lt> y>>.\n\n=back\n"
    )
    assert extract.pod_text(page) == "NAME\n\nopen\n\nSee close or $a->b, x < y.\n"


def test_r_character_vectors_are_read_and_other_files_refused(tmp_path):
    body = (
        b"X\n" + struct.pack(">iiii", 3, 0x40201, 0x30500, 5) + b"UTF-8" + struct.pack(">ii", 16, 2)
    )
    body += b"".join(
        struct.pack(">ii", 0x40009, len(line)) + line for line in (b"EMMA", b"by Jane Austen")
    )
    chunk = struct.pack(">I", len(body)) + zlib.compress(body)
    path = tmp_path / "Rdata.rdb"
    path.write_bytes(chunk * 2)
    assert extract.r_strings(path) == [["EMMA", "by Jane Austen"]] * 2
    path.write_bytes(b"not an R file at all")
    with pytest.raises(FmsimError, match="Rdata.rdb"):
        extract.r_strings(path)


def test_the_split_is_by_name_and_about_a_thirtieth():
    chosen = [is_held_out("p", str(number)) for number in range(20_000)]
    assert chosen == [is_held_out("p", str(number)) for number in range(20_000)]
    assert 0.025 < np.mean(chosen) < 0.04
    assert is_held_out("r-cran-janeaustenr", "Mansfield Park")


def test_english_is_told_from_other_text():
    assert is_english(
        "It is a truth that a man in possession of it must be in want of the other. " * 9
    )
    assert not is_english(
        "Der Speicher ist klein und schnell, aber er vergisst, was lange nicht gebraucht wurde. "
        * 9
    )
    assert not is_english("缓存很小，但速度很快。" * 50)


def test_a_text_without_an_end_of_a_sentence_leaves_facts_where_they_are():
    places = np.array([0, 3])
    assert weaving._snapped(tokens.from_texts({"a": "no end"}), places, 0, 4) is places
