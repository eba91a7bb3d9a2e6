from __future__ import annotations

import pytest

from launch.cluster.options import JobOptions, training_resources
from launch.cluster.passed_through import OWN, passed_through
from launch.cluster.site import Site
from pretrain.config.load import ConfigError


def test_what_is_typed_wins_over_the_site_s() -> None:
    site = {"reservation": "old", "exclusive": True, "comment": "a b", "contiguous": False, "nice": 10}
    found = dict(passed_through(["reservation=new", "--licenses=matlab:1"], site))
    assert found == {
        "reservation": "new", "exclusive": None, "comment": "a b", "nice": "10", "licenses": "matlab:1"
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(OWN))
def test_what_we_set_ourselves_is_refused_with_what_to_use(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is set by selfsight itself.*{OWN[name][:10]}"):
        passed_through([f"{name}=1"], {})
    with pytest.raises(ConfigError, match="site profile"):
        passed_through([], {name: "1"})


@pytest.mark.parametrize("text", ["a\nb=1", "comment=a\n#SBATCH --wrap=x", "=3", "Reservation=x", "x y=1", "-p=gpu"])
def test_what_is_no_option_or_no_line_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"no option|no line breaks"):
        passed_through([text], {})


def test_twice_the_same_is_refused() -> None:
    with pytest.raises(ConfigError, match="reservation twice"):
        passed_through(["reservation=a", "--reservation=b"], {})


def test_they_are_lines_of_the_script_after_ours() -> None:
    options = JobOptions(gpus_per_node="a100:4", sbatch=("comment=for the lab", "exclusive"))
    lines = training_resources(options, Site(gpus_by="gres"), {}).lines()
    assert "#SBATCH --gres=gpu:a100:4" in lines
    assert not any("gpus-per-node" in line for line in lines)
    assert lines[-2:] == ['#SBATCH --comment="for the lab"', "#SBATCH --exclusive"]


@pytest.mark.parametrize("text", ["2x", "-1", "200 G", "many"])
def test_memory_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--memory is .* such as 200G"):
        training_resources(JobOptions(memory=text), Site(), {})
