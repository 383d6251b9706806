"""record.py: what a record says of its command, commit and machine, and where it goes."""

import json
import subprocess

from dpvr.record import commit, publish, publish_section, run_record


def git(folder, *words: str) -> str:
    own = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *own, *words], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_commit_is_that_of_the_folder_and_says_whether_files_differ_from_it(tmp_path):
    assert commit(tmp_path) is None
    git(tmp_path, "init", "--quiet")
    assert commit(tmp_path) is None
    (tmp_path / "a.py").write_text("a = 1\n")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "--quiet", "-m", "a")
    assert commit(tmp_path) == git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "a.py").write_text("a = 2\n")
    assert commit(tmp_path) == git(tmp_path, "rev-parse", "HEAD") + "+"


def test_a_record_names_command_commit_hardware_and_versions():
    record = run_record("-m dpvr.reports")
    assert record["command"].startswith("python -m dpvr.reports") and record["commit"] == commit()
    assert record["hardware"] and {"python", "torch", "transformers", "peft", "trl"} <= record["versions"].keys()


def test_what_is_committed_while_a_command_runs_is_not_what_it_ran(monkeypatch):
    monkeypatch.setattr("dpvr.record.commit", lambda: "later")
    assert run_record("-m dpvr.reports")["commit"] != "later"


def test_a_document_goes_to_its_file_and_only_when_asked_to_standard_output(tmp_path, capsys):
    publish({"a": 1}, tmp_path / "new" / "a.json")
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"a": 1}
    assert capsys.readouterr().out == f"Written to {tmp_path / 'new' / 'a.json'}.\n"
    publish({"a": 1}, None, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"a": 1}


def test_a_section_is_replaced_and_the_others_stay(tmp_path):
    path = tmp_path / "new" / "a.json"
    for name, value in (("one", 1), ("two", 2), ("one", 3)):
        publish_section(name, {"a": value}, path)
    assert json.loads(path.read_text()) == {"one": {"a": 3}, "two": {"a": 2}}
