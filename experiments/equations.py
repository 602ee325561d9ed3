"""From equation to line: writes docs/equations.md from the numbered equations in the files' docstrings.

python -m experiments.equations
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = {  # file: {numbers: the test that checks them}
    "vit.py": {"1 2 3 4 5 6 7": "test_features_and_attention_equal_those_of_the_published_vit"},
    "resnet.py": {"1 2": "test_the_shortcut_is_the_identity_unless_the_shape_changes"},
    "simpool.py": {"12 13 14 15 16 17": "test_pooled_and_attention_equal_the_published_ones"},
    "attention_priors.py": {
        "1": "test_a_prior_drawn_into_an_image_and_cropped_with_it_equals_the_followed_prior",
        "2": "test_the_share_is_how_much_of_a_prior_the_view_sees_and_outside_the_image_there_is_none",
        "3": "test_kl_is_the_formula_with_attention_renormalised_and_heads_without_a_prior_stay_free",
        "4": "test_a_view_counts_by_the_share_that_it_sees",
    },
    "dino.py": {
        "1 3 4": "test_three_steps_of_the_loss_and_its_centre_equal_the_published_ones",
        "5": "test_koleo_is_the_mean_log_distance_to_the_nearest_neighbour_and_keeps_features_apart",
        "6": "test_the_temperature_falls_so_that_the_entropy_of_the_teacher_has_a_ceiling",
        "7 8": "test_near_collapse_koleo_is_added_the_centre_follows_and_the_temperature_falls",
    },
    "lrp.py": {
        "1 2 9": "test_the_epsilon_and_z_box_rules_equal_zennit_s",
        "3 4": "test_the_gamma_rules_equal_a_computation_contribution_by_contribution",
        "5 6 8": "test_the_rules_for_transformers_equal_lxt_s",
        "7": "test_in_training_the_batch_s_statistics_are_constants",
    },
    "isnet_lrp.py": {
        "1": "test_inner_layers_and_attention_count_as_background_where_they_cover_no_foreground",
        "2 3 4": "test_background_and_foreground_loss_equal_the_published_ones",
        "5": "test_patches_log_odds_and_the_range_of_relevance",
        "6": "test_the_attention_loss_is_span_s_toward_the_even_prior",
    },
    "common/registration.py": {
        "1": "test_alignment_recovers_a_known_affine_map_whatever_the_exposure",
        "2": "test_bending_fits_what_no_affine_map_can",
        "3": "test_priors_count_little_in_images_without_the_object",
        "4": "test_a_shift_and_a_scale_are_found_exactly",
        "5": "test_likeness_compares_what_lies_around_the_regions_and_nothing_else",
    },
    "common/regions.py": {"7": "test_the_fewest_pixels_that_hold_the_mass_are_kept"},
    "common/baselines.py": {
        "1": "test_an_attention_gate_pools_as_its_formula_says",
        "2": "test_grad_cam_weighs_the_last_block_s_maps_by_their_mean_gradient",
        "3": "test_rrr_punishes_the_gradient_at_the_input_outside_the_mask",
    },
}
HEAD = """# From equation to line

Each numbered equation in the files' docstrings, the function that computes it, and the test that checks it.
Numbers are those of the papers where a file says so. `python -m experiments.equations` writes this page.
"""


def numbers(text: str) -> list[str]:
    """All equation numbers in a text: (3) gives 3, (5)-(7) and (5) to (7) give 5, 6, 7."""
    found = []
    for first, last in re.findall(r"(?<![\w)])\((\d+)\)(?:(?:-| to )\((\d+)\))?", text):
        found += [str(n) for n in range(int(first), int(last or first) + 1)]
    return found


def formulas(docstring: str) -> dict[str, str]:
    """{number: formula} of a module's docstring, up to where it says how it differs.

    A line further to the right that has no number goes on with the formula of the line before.
    """
    found, last = {}, []
    for line in docstring.split("Where we differ")[0].splitlines():
        pairs = re.findall(r"(\S.*?)\s{2,}(\(\d+\)(?:, \(\d+\))*)(?=[\s,]|$)", line)
        if line.startswith(8 * " ") and not pairs:
            found |= {n: f"{found[n].rstrip(',')}; {line.strip()}" for n in last}
        elif not line.startswith("    "):
            pairs, last = [], []
        for formula, numbered in pairs:
            last = numbers(numbered)
            for n in last:
                found[n] = f"{found[n]}; {formula}" if n in found else formula
    return found


def places(source: str) -> dict[str, tuple[str, int]]:
    """{number: (name, line)} of the function that mentions it first, or else of the first class that does."""
    classes, functions = {}, {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            for n in numbers(ast.get_docstring(node)):
                classes.setdefault(n, (node.name, node.lineno))
        for child in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(child, ast.FunctionDef):
                place = (child.name if child is node else f"{node.name}.{child.name}", child.lineno)
                for n in numbers(ast.get_source_segment(source, child)):
                    functions.setdefault(n, place)
    return classes | functions


def page() -> str:
    """The text of docs/equations.md. Raises KeyError if a number lacks its line or its test."""
    parts = [HEAD]
    for file, checked in TESTS.items():
        source = (ROOT / file).read_text()
        tree, place = ast.parse(source), places(source)
        tests = {n: test for of, test in checked.items() for n in of.split()}
        rows = ["| no. | equation | computed by | checked by |", "| ---: | --- | --- | --- |"]
        found = formulas(ast.get_docstring(tree, clean=False))
        for n, formula in sorted(found.items(), key=lambda e: int(e[0])):
            name, line = place[n]
            of = f"tests/test_{Path(file).name}"
            formula = formula.replace("|", "\\|")
            rows.append(f"| {n} | `{formula}` | [`{name}`](../{file}#L{line}) | `{of}::{tests.pop(n)}` |")
        if tests:
            raise KeyError(f"{file} has no equation {', '.join(tests)}")
        parts.append(f"## {file}\n\n{ast.get_docstring(tree).splitlines()[0]}\n\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (ROOT / "docs/equations.md").write_text(page())
