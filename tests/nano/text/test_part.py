"""Parts of a corpus."""

import numpy as np

from fmsim.nano.text.pack_tokens import write
from fmsim.nano.text.part import first_documents
from fmsim.nano.tokens import Corpus, load


def test_a_part_of_a_corpus_is_whole_documents():
    corpus = Corpus(np.arange(100, dtype=np.uint16), np.array([0, 30, 50, 90, 100]), list("abcd"))
    part = first_documents(corpus, 65, skip=20)
    assert part.names == ["b", "c"] and part.tokens.tolist() == [*range(30, 90)]
    assert part.documents.tolist() == [0, 20, 60]


def test_a_part_is_read_back_as_it_was(tmp_path):
    part = Corpus(np.arange(50, dtype=np.uint16), np.array([0, 20, 50]), ["a", "b"])
    write({"train": part, "held_out": first_documents(part, 20)}, tmp_path)
    again = load(tmp_path, "held_out")
    assert again.names == ["a"] and again.tokens.tolist() == list(range(20))
    assert load(tmp_path, "train").documents.tolist() == [0, 20, 50]
