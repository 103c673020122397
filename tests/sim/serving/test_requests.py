"""Recorded requests in three formats, and workloads whose seed decides everything."""

import pytest

from fmsim.errors import FmsimError
from fmsim.sim.serving.requests import Arrival, read_requests, repeated_share
from fmsim.sim.serving.spec import Bursts, ClosedLoop, Poisson, RequestFile
from fmsim.sim.serving.workload import RequestGenerator

MOONCAKE = """\
{"timestamp": 3000, "input_length": 700, "output_length": 20, "hash_ids": [1, 2]}
{"timestamp": 1500, "input_length": 600, "output_length": 10, "hash_ids": [1, 3]}
"""
AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-17 00:00:00.0000000,110,27
"""
BURSTGPT = """\
Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45.5,GPT-4,1087,0,1087,Conversation log
118,ChatGPT,417,276,693,API log
"""


def written(tmp_path, text):
    path = tmp_path / "requests"
    path.write_text(text)
    return path


def test_mooncake_is_milliseconds_and_sorted(tmp_path):
    path = written(tmp_path, MOONCAKE)
    assert read_requests(path) == [Arrival(0.0, 600, 10, (1, 3)), Arrival(1.5, 700, 20, (1, 2))]
    assert repeated_share(read_requests(path)) == 1 / 4  # of four blocks one had been seen


def test_azure_has_seven_digits_after_the_second_and_passes_midnight(tmp_path):
    path = written(tmp_path, AZURE)
    rows = read_requests(path)
    assert [row[1:3] for row in rows] == [(4808, 10), (3180, 8), (110, 27)]
    assert rows[1].arrival_s == pytest.approx(0.052)
    assert rows[2].arrival_s == pytest.approx(5 * 3600 + 42 * 60 + 56 + 0.02004)
    assert repeated_share(rows) is None


def test_spaces_behind_commas_say_nothing(tmp_path):
    text = 'TIMESTAMP, ContextTokens, GeneratedTokens\n2023-11-16 18:00:00, "400", 6\n'
    assert read_requests(written(tmp_path, text)) == [Arrival(0.0, 400, 6)]
    text = "TIMESTAMP , ContextTokens ,GeneratedTokens \n2023-11-16 18:00:00,400 ,6 \n"
    assert read_requests(written(tmp_path, text)) == [Arrival(0.0, 400, 6)]


def test_three_columns_of_burstgpts_are_enough(tmp_path):
    text = "Timestamp,Request tokens,Response tokens\n5,472,18\n"
    assert read_requests(written(tmp_path, text)) == [Arrival(0.0, 472, 18)]


def test_burstgpt_leaves_out_failed_requests(tmp_path):
    assert read_requests(written(tmp_path, BURSTGPT)) == [
        Arrival(0.0, 472, 18),
        Arrival(113.0, 417, 276),
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n1,2\n", "line 1: neither Mooncake JSON lines"),
        (
            MOONCAKE + '{"timestamp": 1, "input_length": 5}\n',
            "line 3: not a request (no 'output_length')",
        ),
        (MOONCAKE + "{nonsense\n", "line 3: not valid JSON"),
        (AZURE + "2023-11-17 00:00:00,x,3\n", "line 5: not a request"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no request with a prompt"),
    ],
)
def test_a_bad_file_is_told_by_line(tmp_path, text, says):
    with pytest.raises(FmsimError) as error:
        read_requests(written(tmp_path, text))
    assert says in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FmsimError, match="no such request file"):
        read_requests(tmp_path / "none")


def test_a_file_may_be_played_faster_longer_and_cut(tmp_path):
    path = written(tmp_path, BURSTGPT)
    source = RequestGenerator(RequestFile(kind="file", file=path, speed=2, lengths=10), path)
    assert source.first == [Arrival(0.0, 4720, 18), Arrival(56.5, 4170, 276)]
    assert (
        len(RequestGenerator(RequestFile(kind="file", file=path, duration_s=60), path).first) == 1
    )


SIZES = {"prompt_tokens": [1000, 2000], "output_tokens": 64, "duration_s": 100.0}


def test_poisson_comes_at_its_rate_and_as_its_seed_says():
    make = lambda seed: (
        RequestGenerator(Poisson(kind="poisson", rate_per_s=20, seed=seed, **SIZES)).first
    )
    first = make(1)
    assert first == make(1) != make(2)
    assert 1850 < len(first) < 2150  # 2,000 with a standard deviation of 45
    assert all(
        0 <= row.arrival_s < 100 and 1000 <= row.prompt_tokens <= 2000 and row.output_tokens == 64
        for row in first
    )
    assert [row.arrival_s for row in first] == sorted(row.arrival_s for row in first)


def test_bursts_come_together():
    source = RequestGenerator(Bursts(kind="bursts", burst=3, every_s=40, **SIZES))
    assert [row.arrival_s for row in source.first] == [0, 0, 0, 40, 40, 40, 80, 80, 80]


def test_a_closed_loop_asks_again_until_its_time_is_up():
    source = RequestGenerator(ClosedLoop(kind="closed_loop", requests=4, ramp_s=10, **SIZES))
    assert len(source.first) == 4 and all(row.arrival_s <= 10 for row in source.first)
    asked = source.first[0]
    assert source.after(99.0, asked).arrival_s == 99.0
    assert source.after(100.0, asked) is None


@pytest.mark.parametrize(
    "wrong", [{"prompt_tokens": [5, 3]}, {"prompt_tokens": 0}, {"output_tokens": "many"}]
)
def test_lengths_are_numbers_or_ranges(wrong):
    with pytest.raises(ValueError, match="give a number of tokens"):
        Poisson(kind="poisson", rate_per_s=1, **(SIZES | wrong))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("2023-11-16 18:00:00,1_0,6", "'1_0' is no whole number"),
        ("2023-11-16 18:00:00.5.5,10,6", "is no time"),
        ("2023-11-16 18:00:00+02:00,10,6", "has a time zone; write UTC"),
        ("2023-11-16 18:00:00,10", "more or fewer values than the 3 columns"),
        ("2023-11-16 18:00:00,10,6,7", "more or fewer values than the 3 columns"),
        ("2023-11-16 18:00:00,1000000001,6", "more than 1,000,000,000 tokens"),
        ("2023-11-16 18:00:00,6,1000000001", "more than 1,000,000,000 tokens"),
    ],
)
def test_a_bad_row_of_azures_is_told(tmp_path, row, says):
    head = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00+00:00,1000000000,1\n"
    assert read_requests(written(tmp_path, head)) == [Arrival(0.0, 10**9, 1)]
    with pytest.raises(FmsimError) as error:
        read_requests(written(tmp_path, head + row + "\n"))
    assert "line 3" in str(error.value) and says in str(error.value)


def test_a_quotation_that_goes_on_behind_its_end_is_told(tmp_path):
    text = 'Timestamp,Model,Request tokens,Response tokens\n5,"a"b,400,6\n'
    with pytest.raises(FmsimError, match="line 2"):
        read_requests(written(tmp_path, text))


def test_a_column_that_stands_twice_is_told(tmp_path):
    text = "TIMESTAMP,ContextTokens,GeneratedTokens,ContextTokens\n"
    with pytest.raises(FmsimError, match="line 1: the column 'ContextTokens' stands there twice"):
        read_requests(written(tmp_path, text))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"timestamp": true, "input_length": 5, "output_length": 5}', "'timestamp' is True, no"),
        ('{"timestamp": 1, "input_length": 5.5, "output_length": 5}', "'input_length' is 5.5, no"),
        ('{"timestamp": 1, "input_length": 5, "output_length": "5"}', "no whole number"),
        (
            '{"timestamp": 1, "input_length": 5, "output_length": 5, "hash_ids": [1.5]}',
            "'hash_ids' is no list of whole numbers",
        ),
        (
            '{"timestamp": 1, "input_length": 5, "output_length": 5, "hash_ids": 3}',
            "'hash_ids' is no list of whole numbers",
        ),
        (
            '{"timestamp": -1.1e15, "input_length": 5, "output_length": 5}',
            "no finite number of seconds, or too large",
        ),
        ('{"timestamp": 1, "input_length": 5}', "no 'output_length'"),
        (
            '{"timestamp": 1.1e15, "input_length": 5, "output_length": 5}',
            "no finite number of seconds, or too large",
        ),
        ("[1]", "no JSON object"),
    ],
)
def test_a_bad_line_of_mooncakes_is_told(tmp_path, row, says):
    latest = '{"timestamp": 1e15, "input_length": 5, "output_length": 5}\n'
    assert read_requests(written(tmp_path, latest)) == [Arrival(0.0, 5, 5)]
    with pytest.raises(FmsimError) as error:
        read_requests(written(tmp_path, MOONCAKE + "\n" + row + "\n"))
    assert "line 4" in str(error.value) and says in str(error.value)


def test_requests_without_a_prompt_or_an_answer_are_left_out_and_the_first_comes_at_0(tmp_path):
    line = '{"timestamp": %s, "input_length": %d, "output_length": %d}\n'
    text = line % (1000, 0, 5) + line % (2000.5, 5, 0) + line % (3000, 1, 1) + line % (3500, 2, 2)
    assert read_requests(written(tmp_path, text)) == [Arrival(0.0, 1, 1), Arrival(0.5, 2, 2)]


def test_blocks_that_an_earlier_request_had():
    rows = [Arrival(0.0, 1, 1, blocks) for blocks in ((1, 2), (1, 2, 3), (), (3, 4, 1))]
    assert repeated_share(rows) == 4 / 8
    assert repeated_share(rows[:1]) == 0.0 and repeated_share([]) is None
