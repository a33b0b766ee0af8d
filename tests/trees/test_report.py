"""Tables are plain text within the width."""

from patchjax.trees import report


def test_columns_of_numbers_stand_to_the_right():
  text = report.table(["leaf", "n"], [["w", 1], ["bias", 1000]], title="Leaves")
  assert text.splitlines() == [
    "Leaves",
    " leaf      n",
    "-------------",
    " w         1",
    " bias   1000",
  ]


def test_brackets_are_not_markup_and_lines_are_folded_not_cut():
  rows = [["x" * 150, "[red]float32[3,4]"]]
  text = report.table(["name", "type"], rows)
  assert max(map(len, text.splitlines())) <= 100
  assert text.count("x") == 150
  assert "[red]float32[3,4]" in text
  assert "\x1b" not in text


def test_a_table_without_rows_is_its_heading():
  assert report.table(["a", "b"], []).split() == ["a", "b", "-" * 7]


def test_sizes():
  texts = [report.size_text(n) for n in (0, 999, 1000, 5e6, 2e12)]
  assert texts == ["0 B", "999 B", "1.0 kB", "5.0 MB", "2,000.0 GB"]
