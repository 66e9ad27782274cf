"""`predict` as a citizen of pipes: order, memory, pauses, ends, and every kind of line."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from lapora.cli.jsonl import read_lines
from lapora.config import LONGEST_LINE, PredictSettings, PriorSettings
from lapora.errors import DataError
from lapora.workflows.predict import predict
from lapora.workflows.tune_prior import tune_prior
from tiny_adapter import command, fit_tiny, json_lines, make_adapter, model_of


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = make_adapter(tmp_path_factory.mktemp("tiny"))
    fit_tiny(folder)
    tune_prior(model_of(folder), None, PriorSettings(method="validation"))  # one precision, tuned on labelled rows
    return folder


@pytest.fixture
def run(tiny, monkeypatch, capfdbinary):
    def call(stdin: bytes, *options: object, source: str = "-"):
        arguments = ("predict", tiny / "adapter", source, "--device", "cpu", *options)
        status, out, errors = command(monkeypatch, capfdbinary, *arguments, stdin=stdin)
        assert "Traceback" not in errors
        assert not out or out.endswith(b"\n")
        return status, [json.loads(line) for line in out.splitlines()], errors

    return call


GOOD = b'{"story": "the cows are in the barn"}'
LINES = {
    "crlf": (GOOD + b"\r\n", None),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD + b"\n", None),
    "spaces around": (b"  \t" + GOOD + b"  \n", None),
    "duplicate key: the last counts": (b'{"story": "no", "story": "the cows are in the barn"}\n', None),
    "one megabyte": (b'{"story": "the cows are in the barn", "other": "' + b"x" * 1_000_000 + b'"}\n', None),
    "one megabyte of prompt": (b'{"story": "' + b"cows " * 200_000 + b'"}\n', "more than the maximum of 48"),
    "not UTF-8": (b'{"story": "\xff\xfe"}\n', "not UTF-8 at byte 11"),
    "UTF-16": (GOOD.decode().encode("utf-16-le") + b"\n", "not"),
    "half a surrogate pair": (b'{"story": "\\ud800"}\n', "an unpaired surrogate"),
    "NaN": (b'{"story": NaN}\n', "NaN is not JSON"),
    "Infinity": (b'{"story": "a", "id": -Infinity}\n', "-Infinity is not JSON"),
    "a number too large": (b'{"story": "a", "id": 1e999}\n', "is too large"),
    "a number of 5,000 digits": (b'{"story": "a", "id": ' + b"7" * 5000 + b"}\n", "not JSON"),
    "nested 100,000 deep": (b'{"story": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "nested too deeply"),
    "nested 900 deep, as a field": (b'{"story": ' + b"[" * 900 + b"]" * 900 + b"}\n", None),
    "nested 900 deep, as an id": (b'{"story": "a", "id": ' + b"[" * 900 + b"]" * 900 + b"}\n", "its id is a list"),
    "an object as an id": (b'{"story": "a", "id": {"a": 1}}\n', "its id is an object"),
    "a list": (b"[1, 2]\n", "not a JSON object"),
    "a number": (b"7\n", "not a JSON object"),
    "null": (b"null\n", "not a JSON object"),
    "two objects": (GOOD + GOOD + b"\n", "Extra data"),
    "a zero byte": (b"\0\n", "not JSON"),
    "another field": (b'{"question": "a"}\n', "no value for story"),
    "an empty prompt": (b'{"text": "  "}\n', "the rendered text is empty"),
    "too long a line": (b'{"story": "' + b"x" * LONGEST_LINE + b'"}\n', "the maximum length of a line"),
}


@pytest.mark.parametrize(("line", "error"), LINES.values(), ids=LINES)
def test_each_kind_of_line(run, line, error):
    """A good line before and after; the line itself is right, or is one record that says what is wrong."""
    around = GOOD + b"\n"
    status, records, errors = run(around + line + around, "--on-error", "report")
    assert [record["index"] for record in records] == [0, 1, 2]
    assert "probabilities" in records[0] and "probabilities" in records[2]
    if error is None:
        assert status == 0 and "probabilities" in records[1]
    else:
        assert status == 5 and error in records[1]["error"] and "line 2" in records[1]["error"]
        assert "1 bad line; it is" in errors
        status, records, errors = run(around + line + around)
        assert (status, len(records)) == (5, 1) and "line 2" in errors and len(errors.splitlines()) == 1


def test_empty_input_and_blank_lines(run):
    assert run(b"") == (0, [], "")
    assert run(b"\n\r\n  \n\xef\xbb\xbf\n") == (0, [], "")
    status, records, _ = run(b"\n" + GOOD + b"\n\n\n" + b"no\n" + GOOD, "--on-error", "report")
    assert status == 5 and [record["index"] for record in records] == [0, 1, 2]
    assert "line 5" in records[1]["error"]  # blank lines are no rows, but an editor counts them


def test_ids_are_handed_through_twice_the_same_included(run):
    ids = ["a", "a", 7, 7.5, True, "\x1b[31m\x9b2J\u202e", "\u2028", None]
    lines = b"".join(json.dumps({"story": "cows", "id": each}).encode() + b"\n" for each in ids)
    status, records, _ = run(lines)
    assert status == 0 and [record.get("id") for record in records] == ids and "id" not in records[-1]
    status, records, _ = run(b'{"story": "cows", "id": "\\ud800"}\n')
    assert status == 0 and records[0]["id"] == "\ud800"


def test_order_is_that_of_the_input_whatever_the_batches(run):
    lines = b"".join(
        json.dumps({"story": " ".join(["cows"] * (1 + 7 * i % 11)), "id": i}).encode() + b"\n" for i in range(200)
    )
    for options in ((), ("--batch-size", 1), ("--batch-size", 7)):
        _, records, _ = run(lines, *options)
        assert [(record["index"], record["id"]) for record in records] == [(i, i) for i in range(200)]


def test_a_file_a_named_pipe_and_nothing(run, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    assert run(b"", source=str(tmp_path / "in.jsonl"))[1][0]["index"] == 0
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(GOOD + b"\n" + GOOD))
    writer.start()
    assert len(run(b"", source=str(tmp_path / "pipe"))[1]) == 2
    writer.join()
    status, _, errors = run(b"", source=str(tmp_path / "nothing"))
    assert status == 5 and "cannot be read" in errors
    assert run(b"", source=str(tmp_path))[0] == 5  # a folder


def test_an_output_that_fills(run):
    status, _, errors = run(GOOD + b"\n", "--output", "/dev/full")
    assert status == 5 and "No space left" in errors and len(errors.splitlines()) == 1


def test_the_input_is_not_written_over(run, tmp_path):
    rows, link = tmp_path / "rows.jsonl", tmp_path / "link.jsonl"
    rows.write_bytes(GOOD + b"\n")
    link.symlink_to(rows)
    for target in (rows, link):
        status, _, errors = run(b"", "--output", target, source=str(rows))
        assert status == 2 and "is the input file" in errors and rows.read_bytes() == GOOD + b"\n"


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_standard_input_is_not_written_over(tiny, tmp_path, ending):
    rows = tmp_path / f"rows.{ending}"
    rows.write_bytes(GOOD + b"\n")
    words = ("-m", "lapora", "predict", tiny / "adapter", "-", "-o", rows, "--device", "cpu", "--input-format", "jsonl")
    with rows.open("rb") as stream:
        done = subprocess.run([sys.executable, *map(str, words)], stdin=stream, capture_output=True, text=True)
    assert done.returncode == 2 and "is the input file" in done.stderr and rows.read_bytes() == GOOD + b"\n"


def test_a_run_that_fails_before_its_first_answer_leaves_the_old_output(run, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_bytes(b"precious\n" * 1000)
    assert run(GOOD, "--output", out, "--name", "nothing")[0] == 4
    assert out.read_bytes() == b"precious\n" * 1000
    assert run(GOOD + b"\nbad", "--output", out)[0] == 5
    assert json.loads(out.read_bytes())["index"] == 0
    assert run(b"", "--output", out)[0] == 0 and out.read_bytes() == b""


def test_nothing_reaches_a_terminal_raw(run, capfdbinary):
    status, _, errors = run(b'{"\x9b": "\xc2\x9b2J", "\\u001b[31m": 1}\n')
    assert status == 5 and errors.isprintable() is False and "\x1b" not in errors and "\x9b" not in errors


def test_reading_lines_of_a_pipe_gives_lines_and_pauses():
    reading, write_lock = os.pipe()
    lines = read_lines(reading)
    os.write(write_lock, b"one\ntw")
    assert next(lines) == b"one\n"
    assert next(lines) is None  # the writer pauses
    os.write(write_lock, b"o\n\nthree")
    assert [next(lines), next(lines), next(lines)] == [b"two\n", b"\n", None]
    os.close(write_lock)
    assert list(lines) == [b"three"]
    os.close(reading)


def test_a_line_without_end_is_not_held_in_memory(tmp_path):
    (tmp_path / "long").write_bytes(b"x" * (3 * LONGEST_LINE) + b"\nshort\n" + b"y" * (2 * LONGEST_LINE))
    with (tmp_path / "long").open("rb") as stream:
        lengths = [len(line) for line in read_lines(stream.fileno())]
    assert lengths == [LONGEST_LINE + 2, 6, LONGEST_LINE + 1]


def test_a_pause_is_answered_and_full_windows_are_kept(tiny):
    def source():
        for index, line in enumerate(json_lines(7)):
            yield line
            if index in (0, 4):
                yield None
            asked.append(index)

    asked: list[int] = []
    answered = []
    for record in predict(model_of(tiny, batch_size=1), PredictSettings(), source()):
        answered.append((record["index"], len(asked)))
    assert answered == [(0, 0), (1, 4), (2, 4), (3, 4), (4, 4), (5, 7), (6, 7)]


def test_what_came_before_a_bad_line_is_written_and_what_comes_after_is_not_read(tiny):
    lines = iter([*json_lines(20)[:9], b"bad\n", *json_lines(5000)])
    found = []
    with pytest.raises(DataError, match="line 10"):
        found.extend(predict(model_of(tiny), PredictSettings(), lines))
    records = predict(model_of(tiny), PredictSettings(), iter([*json_lines(9), b"bad\n"]))
    seen = []
    with pytest.raises(DataError):
        for record in records:
            seen.append(record["index"])
    assert seen == list(range(9)) and len(list(lines)) > 4000


# Real processes, slow for their start alone: one conversation, one interruption, one reader that goes.


def heed_interrupts() -> None:
    """Undo that a test runner in the background ignores SIGINT, and that its children would too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def start(tiny: Path, *options: str, heed: Callable[[], None] = heed_interrupts) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "lapora", "predict", str(tiny / "adapter"), "--device", "cpu", *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=heed,
    )


@pytest.mark.slow
def test_a_conversation_then_control_c(tiny):
    """One line, its answer, the next line; then Ctrl-C: status 130, one line on stderr, whole lines on stdout."""
    with start(tiny) as process:
        waits = []
        for line in json_lines(5):
            begun = time.monotonic()
            process.stdin.write(line)
            process.stdin.flush()
            json.loads(process.stdout.readline())
            waits.append(time.monotonic() - begun)
        assert min(waits[1:]) < 5  # an answer, long before a window is full
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors) == (130, b"", b"error: interrupted\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("delay", "sent", "heed"),
    [
        *((delay, signal.SIGINT, heed_interrupts) for delay in (0.0, 0.05, 0.2, 0.5, 1.0)),
        (0.05, signal.SIGTERM, heed_interrupts),
        (0.2, signal.SIGTERM, ignore_interrupts),
    ],
)
def test_a_signal_at_any_moment_leaves_whole_lines(tiny, delay, sent, heed):
    """SIGTERM does what Ctrl-C does, and the caller sees the signal."""
    with start(tiny, "--batch-size", "4", heed=heed) as process:
        feeder = threading.Thread(target=feed, args=(process, json_lines(20_000)))
        feeder.start()
        first = process.stdout.readline()
        time.sleep(delay)
        process.send_signal(sent)
        rest = process.stdout.read()
        process.wait(60)
        assert process.stderr.read() == b"error: interrupted\n"
        feeder.join(60)
    assert process.returncode == (130 if sent == signal.SIGINT else -signal.SIGTERM)
    out = first + rest
    assert out.endswith(b"\n")
    assert [json.loads(line)["index"] for line in out.splitlines()] == list(range(out.count(b"\n")))


WRITER = """
import sys
from lapora.cli.jsonl import write_json_lines
try:
    write_json_lines(({"index": index, "id": "x" * 300_000} for index in range(1000)), "-")
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("presses", [1, 2])
def test_control_c_with_a_slow_reader_and_long_lines(presses):
    """A line larger than the pipe is half out when the reader pauses: it is ended first, but not at a second Ctrl-C."""
    restore = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    command = [sys.executable, "-c", WRITER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=restore) as process:
        out = os.read(process.stdout.fileno(), 100_000)
        for _ in range(presses):
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
        if presses == 2:
            assert process.wait(20) == 130
        out += process.stdout.read()
        assert process.wait(20) == 130 and process.stderr.read() == b""
    assert out.endswith(b"\n") == (presses == 1)


def test_control_c_where_nothing_of_a_line_is_out(tmp_path):
    """A full pipe that nobody reads: the run ends at once, with whole lines in it."""
    reading, write_lock = os.pipe()
    script = WRITER.replace("300_000", "65_500")
    restore = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=write_lock, preexec_fn=restore)
    os.close(write_lock)
    while int.from_bytes(fcntl.ioctl(reading, termios.FIONREAD, b"    "), sys.byteorder) < 65_500:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    with os.fdopen(reading, "rb") as stream:
        assert [json.loads(line)["index"] for line in stream] == [0]


def feed(process: subprocess.Popen, lines: list[bytes]) -> None:
    try:
        for line in lines:  # unbuffered: nothing is left over when the process has gone
            os.write(process.stdin.fileno(), line)
        process.stdin.close()
    except (BrokenPipeError, ValueError):
        pass


@pytest.mark.slow
def test_control_c_while_it_starts(tiny):
    for delay in (0.1, 0.5, 1.5, 3.0, 6.0):
        with start(tiny) as process:
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            out, errors = process.communicate(timeout=60)
        # Before Python has set its own handler the signal ends the process: 130 for a shell all the same.
        assert process.returncode in (130, -signal.SIGINT), errors
        # A signal while Python imports the package itself, before main, is Python's to report.
        assert out == b"" and b"lapora/cli" not in errors and b"lapora/workflows" not in errors


def test_control_c_in_a_destructor_is_not_lost():
    code = """
import time
import lapora.__main__, lapora.cli.app

class Unlucky:
    def __del__(self):
        raise KeyboardInterrupt

def run():
    Unlucky()
    time.sleep(20)
    print("went on")

lapora.cli.app.run = run
lapora.__main__.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, preexec_fn=heed_interrupts
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


@pytest.mark.slow
def test_head_1_ends_it_quietly(tiny):
    script = f"yes '{GOOD.decode()}' | {sys.executable} -m lapora predict {tiny / 'adapter'} --device cpu | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", script], capture_output=True, timeout=300)
    assert len(done.stdout.splitlines()) == 1 and b"error" not in done.stderr and b"Traceback" not in done.stderr
    with start(tiny, "--batch-size", "1") as process:
        threading.Thread(target=feed, args=(process, json_lines(2000)), daemon=True).start()
        process.stdout.readline()
        process.stdout.close()
        assert (process.wait(120), process.stderr.read()) == (0, b"")


@pytest.mark.slow
def test_a_long_stream_at_constant_memory(tiny):
    """RSS after 50,000 lines and at the end; LAPORA_LINES sets another count."""
    count = int(os.environ.get("LAPORA_LINES", "200000"))
    block = b"".join(json_lines(1000))
    with start(tiny, "--link", "map", "--batch-size", "64") as process:

        def write() -> None:
            for _ in range(count // 1000):
                process.stdin.write(block)
            process.stdin.close()

        threading.Thread(target=write, daemon=True).start()
        early = 0
        for index, line in enumerate(process.stdout):
            if index % 50_000 == 0:
                assert json.loads(line)["index"] == index
                now = resident(process.pid)
                print(f"{index:>9,} lines, {now / 2**20:.1f} MiB", flush=True)
                early = early or (now if index >= 50_000 else 0)
        assert index == count - 1
        assert process.wait(60) == 0
    assert now - early < 8 * 2**20


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
