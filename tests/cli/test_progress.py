"""Progress of a decode where no terminal is."""

from fmsim.cli import progress


def test_a_pipe_gets_a_line_now_and_then(capsys, monkeypatch):
    now_s = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now_s[0])
    with progress.token_bar(3000) as advance:
        for _ in range(3):
            now_s[0] += 3
            advance(1000)
    told = capsys.readouterr()
    assert told.out == "" and told.err == "read and decoded 2,000 of 3,000 tokens in 6 s\n"
