"""The plot of forgetting on the real model: each domain's tables on the page are found and read."""

import importlib.util

import pytest
from guide_code import ROOT


@pytest.fixture(scope="module")
def plot():
    spec = importlib.util.spec_from_file_location("forgetting_plot", ROOT / "docs" / "forgetting_plot.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_domain_of_the_page_has_points(plot):
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for domain in plot.DOMAINS:
        found = plot.points(page, domain)
        assert (len(found["LoRA"]), len(found["anchor"])) == ((2, 3) if domain == "Support" else (1, 1)), domain
        assert len(found["scale"]) >= 3, domain
        assert 0 < max(kl for kl, _ in found["anchor"]) < min(kl for kl, _ in found["LoRA"]) < 1
        assert all(10 < right < 100 for _, right in found["LoRA"] + found["anchor"])


def test_points_are_the_cells_of_a_section(plot):
    page = """
## Other

| scale of the update | right | KL |
| ---: | ---: | ---: |
| 1 | 9.0% | 0.9 |

## Codes

|  | LoRA | LoRA with the anchor |
| --- | ---: | ---: |
| right code | 36.8% (33.8% to 39.8%) | 36.9% |
| KL from the base | 0.523 (0.500 to 0.548) | 0.037 |

| scale of the update | right code | KL |
| ---: | ---: | ---: |
| 1 | 33.7% (28.7% to 39.0%) | 0.541 (0.503 to 0.586) |
| 0.5 | 18.0% | 0.124 |
| 1, but at another rate | 1.0% | 0.1 |
"""
    assert plot.points(page, "Codes") == {
        "scale": [(0.541, 33.7), (0.124, 18.0)],
        "LoRA": [(0.523, 36.8)],
        "anchor": [(0.037, 36.9)],
    }
