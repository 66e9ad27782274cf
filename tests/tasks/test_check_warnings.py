"""`lapora tasks --check` warns of labels that `fit` refuses."""

from __future__ import annotations

import json

import yaml

from tiny_adapter import command, make_adapter


def test_missing_labels_are_warned_of(tmp_path, monkeypatch, capfdbinary):
    folder = make_adapter(tmp_path)
    task = yaml.safe_load((folder / "task.yaml").read_text())
    rows = [json.loads(line) for line in (folder / "data" / "train.jsonl").read_text().splitlines()]

    def said(changes, change_row) -> list[str]:
        (folder / "checked.yaml").write_text(yaml.safe_dump({**task, **changes}))
        lines = (json.dumps(change_row(dict(row), index)) for index, row in enumerate(rows))
        (folder / "data" / "train.jsonl").write_text("\n".join(lines) + "\n")
        checked = ("tasks", "--check", folder / "checked.yaml", "--adapter", folder / "adapter")
        status, out, err = command(monkeypatch, capfdbinary, *checked, "--data-dir", folder / "data")
        assert status == 0 and json.loads(out)["rows"] == len(rows), err
        return [line for line in err.splitlines() if line.startswith("warning: ")]

    def unlabelled(row, index):
        if index < 3:
            del row["label"]
        return row

    assert said({}, lambda row, index: row) == []
    (wrong_field,) = said({"doc_to_target": "lable"}, lambda row, index: row)
    assert "no row has lable; the first row has" in wrong_field
    (no_field,) = said({"doc_to_target": None}, lambda row, index: row)
    assert "no row has a label" in no_field
    (some,) = said({}, unlabelled)
    assert f"3 of {len(rows)} rows have no label" in some and "which fit refuses" in some
    (one,) = said({}, lambda row, index: {**row, "label": 0})
    assert one == f"warning: no row has the label {task['doc_to_choice'][1]}"
