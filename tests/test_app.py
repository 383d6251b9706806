"""The app as programs meet it: the API, bad input, strangers' files, and many askers at once."""

import gc
import inspect
import json
import os
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from app import parse_args
from dpvr.inference import controls
from dpvr.inference.api import Api
from dpvr.inference.chat import Turn
from dpvr.inference.comparison import FEWEST
from dpvr.inference.conversation import MAX_PICTURES
from dpvr.inference.page import build, launch, write_examples
from minibench.scenes import make_scene

QUESTION = "What colour is the star?"


@pytest.fixture(scope="module")
def url(answerer, tmp_path_factory) -> str:
    served = build(answerer, "About.", write_examples(tmp_path_factory.mktemp("examples")))
    launch(served, host="127.0.0.1", port=None, prevent_thread_lock=True, quiet=True)
    yield served.local_url
    served.close()


@pytest.fixture(scope="module")
def client(url) -> Client:
    return Client(url, verbose=False)


@pytest.fixture
def picture(tmp_path) -> Path:
    make_scene("test", 0, 6).draw().save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def test_the_api_answers_in_growing_pieces_with_a_readout_at_the_end(client, answerer, picture):
    files = [handle_file(picture)]
    job = client.submit(question=QUESTION, pictures=files, longest=12, api_name="/ask")
    last = job.result(timeout=60)
    expected = answerer.answer([Turn(QUESTION, (Image.open(picture),))], max_new_tokens=12)
    assert last["answer"] == expected.text
    assert last["readout"]["new_tokens"] == 12 and last["readout"]["first_token"] > 0
    pieces = job.outputs()
    assert len(pieces) > 3 and all(piece["readout"] is None for piece in pieces[:-1])


def test_the_api_takes_the_routing(client, answerer, picture):
    for routing in ("none", "late_fusion"):
        last = client.predict(
            question=QUESTION, pictures=[handle_file(picture)], routing=routing, longest=6, api_name="/ask"
        )
        turns = [Turn(QUESTION, (Image.open(picture),))]
        assert last["answer"] == answerer.answer(turns, routing=routing, max_new_tokens=6).text
        assert last["readout"]["routing"] == routing
    with pytest.raises(AppError, match="routing is .late.: choose one of"):
        client.predict(question=QUESTION, pictures=None, routing="late", api_name="/ask")


def test_the_api_compares_and_looks_inside(client, picture):
    files = [handle_file(picture)]
    found = client.predict(question=QUESTION, pictures=files, longest=4, api_name="/compare")
    assert found["vanilla"]["medians"]["routing"] == "none" and found["dpvr"]["medians"]["routing"] == "late_fusion"
    medians = [found[name]["medians"]["prefill"] for name in ("dpvr", "vanilla")]
    assert found["ratios"]["prefill"] == pytest.approx(medians[0] / medians[1])
    ratio = found["prefill_ratio"]
    assert ratio["low"] <= ratio["estimate"] <= ratio["high"] and isinstance(ratio["conclusive"], bool)
    assert found["same_answer"] == (found["vanilla"]["answer"] == found["dpvr"]["answer"])
    inside = client.predict(question=QUESTION, pictures=files, api_name="/look_inside")
    assert len(inside["dpvr"]["mass"]) == 4 and len(inside["dpvr"]["heat"][0]) == 64
    assert inside["dpvr"]["answer_mass"][3] == pytest.approx(sum(inside["dpvr"]["heat"][0]))


def test_the_api_says_what_is_wrong_and_goes_on(client, picture, tmp_path):
    (tmp_path / "a.png").write_bytes(picture.read_bytes()[:200])
    for arguments, message in [
        ({"question": "", "pictures": None}, "The question is empty: type one"),
        ({"question": QUESTION, "pictures": [handle_file(tmp_path / "a.png")]}, "damaged or cut off"),
        ({"question": "word " * 10_000, "pictures": None}, "at most 20,000 are taken"),
        (
            {"question": "<script>", "pictures": [handle_file(picture)] * 9},
            f"There are 9 pictures, and the chat takes at most {MAX_PICTURES}",
        ),
        ({"question": "a <image> b", "pictures": None}, "holds '<image>', one of the model's special tokens"),
        ({"question": QUESTION, "pictures": None, "longest": 100_000}, "256"),
        (
            {"question": QUESTION, "pictures": None, "temperature": 1e-39},
            "answer, or 0.05 to 2.0",
        ),
    ]:
        with pytest.raises(AppError, match=re.escape(message)):
            client.predict(**arguments, api_name="/ask")
    with pytest.raises(AppError, match="There is no picture to look at: send one"):
        client.predict(question=QUESTION, pictures=None, api_name="/look_inside")
    assert client.predict(question=QUESTION, pictures=None, longest=2, api_name="/ask")["readout"]["new_tokens"] == 2


def call(url: str, name: str, data: list) -> str:
    """What the server streams for a call made by hand."""
    sent = {"content": json.dumps({"data": data}), "headers": {"Content-Type": "application/json"}}  # NaN, too
    event = httpx.post(f"{url}gradio_api/call/{name}", **sent).json()["event_id"]
    return httpx.get(f"{url}gradio_api/call/{name}/{event}", timeout=60).text


def test_files_of_the_server_cannot_be_read(url, tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    for path in ("/etc/passwd", str(tmp_path / "secret.png"), str(Path("app.py").resolve()), "../../etc/passwd"):
        assert httpx.get(f"{url}gradio_api/file={path}").status_code in (403, 404), path
    for path in (str(tmp_path / "secret.png"), "/etc/passwd"):
        stolen = [{"path": path, "meta": {"_type": "gradio.FileData"}}]
        said = call(url, "ask", [QUESTION, stolen, "late_fusion", 4, 0])
        assert "event: error" in said and "event: complete" not in said and "root:" not in said


def test_web_addresses_are_refused_before_anything_is_fetched(url, monkeypatch):
    def fetch(*_, **__):
        raise AssertionError("fetched")

    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", fetch)
    for path in ("https://huggingface.co/a/b/resolve/main/model.safetensors", "http://127.0.0.1:1/a.png"):
        said = call(url, "ask", [QUESTION, [{"path": path, "meta": {"_type": "gradio.FileData"}}], "none", 4, 0])
        assert "event: error" in said and "is a web address: upload" in said


def test_askers_at_the_same_time_get_their_own_answers(url, answerer, tmp_path):
    questions = {}
    for index in range(6):
        make_scene("test", 0, index).draw().save(tmp_path / f"{index}.png")
        turn = Turn(f"{index}?", (Image.open(tmp_path / f"{index}.png"),))
        questions[index] = answerer.answer([turn], max_new_tokens=8).text
    assert len(set(questions.values())) > 1

    def ask(index: int) -> str:
        files = [handle_file(tmp_path / f"{index}.png")]
        asker = Client(url, verbose=False)
        return asker.predict(question=f"{index}?", pictures=files, longest=8, api_name="/ask")["answer"]

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, questions)) == list(questions.values())


def over_a_pipe(function: Callable) -> Callable:
    """What a Space with shared GPUs does: the function runs in a fork, which gets and gives copies."""

    def copied(what: object) -> object:
        return pickle.loads(pickle.dumps(what))

    def run(*args: object, **settings: object) -> object:
        return copied(function(*copied(args), **copied(settings)))

    def run_pieces(*args: object, **settings: object) -> Iterator[object]:
        for piece in function(*copied(args), **copied(settings)):
            yield copied(piece)

    return run_pieces if inspect.isgeneratorfunction(function) else run


def test_what_goes_to_a_shared_gpu_and_back_can_be_copied(answerer, picture, monkeypatch):
    monkeypatch.setattr(controls, "on_gpu", over_a_pipe)
    api = Api(answerer)
    *_, last = api.ask(QUESTION, [str(picture)], "late_fusion", 4, 0)
    assert last["answer"] == answerer.answer([Turn(QUESTION, (Image.open(picture),))], max_new_tokens=4).text
    assert api.compare(QUESTION, [str(picture)], 2)["repetitions"] >= FEWEST
    assert len(api.look_inside(QUESTION, [str(picture)])["dpvr"]["mass"]) == 4


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory in use from Linux's /proc")
def test_memory_returns_to_its_start_after_many_requests(answerer, client, picture):
    """Every request holds a picture of 2.25 MiB while it runs; to keep them all would take 112 MiB."""
    large = Image.open(picture).resize((886, 886))
    large.save(picture.with_name("large.png"))
    files = [handle_file(picture.with_name("large.png"))]

    def ask(times: int) -> int:
        for _ in range(times):
            client.reset_session()
            client.predict(question="b " * 200, pictures=files, longest=2, api_name="/ask")
        gc.collect()
        return resident_bytes()

    start = ask(10)
    end = ask(50)
    threads = threading.active_count()
    assert end - start < 40 * 2**20, f"{(end - start) / 2**20:.0f} MiB more than at the start"
    ask(5)
    assert threading.active_count() <= threads + 2


def test_the_defaults_are_the_embedded_model_on_this_machine_alone():
    args = parse_args([])
    assert (Path(args.model) / "config.json").exists() and args.host is None and args.port is None


def test_the_api_is_three_endpoints(client):
    described = client.view_api(return_format="dict")["named_endpoints"]
    assert sorted(described) == ["/ask", "/compare", "/look_inside"]
    parameters = [parameter["parameter_name"] for parameter in described["/ask"]["parameters"]]
    assert parameters == ["question", "pictures", "routing", "longest", "temperature"], json.dumps(described)
