"""Attacks on the YAML of a merge: it must say what it means, and no more than a merge has use for."""

from __future__ import annotations

from attacks.kinds import attack
from attacks.workplace import Workplace


def text(place: Workplace, old: str, new: str) -> None:
    file = place / "merge.yml"
    content = file.read_text(encoding="utf-8")
    assert old in content
    file.write_text(content.replace(old, new), encoding="utf-8")


@attack("yaml", "lambda is given twice")
def a_key_twice(place: Workplace) -> None:
    text(place, "lambda: 0.5", "lambda: 0.5\n  lambda: 1.0")


@attack("yaml", "lambda is true, where a number")
def a_truth_value_as_a_scale(place: Workplace) -> None:
    text(place, "lambda: 0.5", "lambda: true")


@attack("yaml", "density is 2; give a number above 0 and at most 1")
def a_density_above_one(place: Workplace) -> None:
    text(place, "density: 0.5", "density: 2")


@attack("yaml", "density is -0.5; give a number above 0 and at most 1")
def a_density_below_zero(place: Workplace) -> None:
    """It would change nothing, and say nothing."""
    text(place, "density: 0.5", "density: -0.5")


@attack("yaml", "linear sum to 0")
def weights_that_cancel(place: Workplace) -> None:
    text(place, "merge_method: ties", "merge_method: linear")
    text(place, "  density: 0.5\n  weight: 1.0\n  lambda: 0.5", "  weight: [{filter: x, value: 1}, {value: 0}]")


@attack("yaml", "bytes, more than 200000")
def a_gradient_of_200000_numbers(place: Workplace) -> None:
    text(place, "lambda: 0.5", f"lambda: [{', '.join(['1'] * 200_000)}]")


@attack("yaml", "a list of 2000 values")
def a_gradient_of_2000_numbers(place: Workplace) -> None:
    text(place, "lambda: 0.5", f"lambda: [{', '.join(['1'] * 2000)}]")


@attack("yaml", "holds more than 100000 values")
def a_thousand_million_laughs(place: Workplace) -> None:
    """Nine lines of aliases that stand for 10^9 values."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)]
    text(place, "merge_method", "\n".join(lines) + "\nmerge_method")


@attack("yaml", "an alias stands inside of what it stands for")
def an_alias_of_itself(place: Workplace) -> None:
    text(place, "merge_method", "a: &a [*a]\nmerge_method")


@attack("yaml", "nested more than 100 deep")
def deep_yaml(place: Workplace) -> None:
    text(place, "merge_method", f"a: {'[' * 5000}{']' * 5000}\nmerge_method")


@attack("yaml", "nested more than 100 deep")
def deep_yaml_by_indentation(place: Workplace) -> None:
    text(place, "merge_method", f"a:\n  {'- ' * 5000}x\nmerge_method")


@attack("yaml", "a number of 5000 digits")
def a_yaml_number_of_5000_digits(place: Workplace) -> None:
    text(place, "lambda: 0.5", f"lambda: {'9' * 5000}")


@attack("yaml", "a value has no 'filters' (did you mean filter?)")
def a_misspelt_filter(place: Workplace) -> None:
    """The value would hold everywhere."""
    text(place, "lambda: 0.5", "lambda: [{filters: mlp, value: 1}, {value: 0}]")


@attack("yaml", "mergekit would ignore the unknown key 'colour'")
def an_unknown_key_of_a_model(place: Workplace) -> None:
    text(place, "- model:", "- colour: red\n  model:")


@attack("yaml", "has 1500")
def a_file_of_megabytes(place: Workplace) -> None:
    text(place, "merge_method", "#" * 1_500_000 + "\nmerge_method")


@attack("yaml", "")
def a_model_with_a_name_of_5000_characters(place: Workplace) -> None:
    text(place, str(place / "math"), "a" * 5000)


@attack("yaml", "holds 2 documents, of which this makes one model; add --intermediate-dir")
def two_merges_in_one_file(place: Workplace) -> None:
    """As mergekit-multi takes them; the second would be lost."""
    file = place / "merge.yml"
    file.write_text("---\n".join([file.read_text(encoding="utf-8")] * 2), encoding="utf-8")
