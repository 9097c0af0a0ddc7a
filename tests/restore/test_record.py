"""A result is taken for what a run would make only if it was made in the same way."""

from colora_peft.restore.record import RECORD_FILE, RestoreRecord

SETTINGS = {"weights": "abc", "tile": 512}


def write(record, result, settings, content=b"pixels"):
    record.add(result, content, settings)
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_bytes(content)


def test_the_last_line_on_a_result_holds_and_survives(tmp_path):
    output_dir = tmp_path / "out"
    record, result = RestoreRecord(output_dir), output_dir / "below" / "a.png"
    write(record, result, {**SETTINGS, "tile": 64})
    write(record, output_dir / "b.png", SETTINGS)
    write(record, result, SETTINGS)
    for each in (record, RestoreRecord(output_dir)):
        assert each.difference(result, SETTINGS) is None
        assert each.difference(result, {**SETTINGS, "tile": 64}) == "tile was 512, is 64"
        assert each.difference(result, {"weights": "abc"}) == "tile was 512, is None"


def test_a_line_holds_for_its_bytes_alone(tmp_path):
    record, result, other = RestoreRecord(tmp_path), tmp_path / "a.png", {**SETTINGS, "tile": 64}
    write(record, result, SETTINGS, b"old")
    record.add(result, b"new", other)  # and the file was not written
    for each in (record, RestoreRecord(tmp_path)):
        assert each.difference(result, SETTINGS) is None and each.difference(result, other) is not None
    result.write_bytes(b"by hand")
    assert record.difference(result, SETTINGS) == "it was changed since a run wrote it"
    (tmp_path / "b.png").write_bytes(b"old")
    assert record.difference(tmp_path / "b.png", SETTINGS) == "no run wrote it"


def test_half_a_line_of_a_killed_run_costs_that_line_only(tmp_path):
    record = RestoreRecord(tmp_path)
    write(record, tmp_path / "a.png", SETTINGS)
    write(record, tmp_path / "b.png", SETTINGS)
    path = tmp_path / RECORD_FILE
    path.write_bytes(path.read_bytes()[:-20])
    again = RestoreRecord(tmp_path)
    assert again.difference(tmp_path / "a.png", SETTINGS) is None
    assert again.difference(tmp_path / "b.png", SETTINGS) is not None
    write(again, tmp_path / "c.png", SETTINGS)
    assert RestoreRecord(tmp_path).difference(tmp_path / "c.png", SETTINGS) is None
