"""Plans in the making: interrupted, begun again with other options, and what is left of them."""

import pytest
from corpora import make_corpus

from data_tools import planner, scan
from data_tools.draft import Draft, Request
from data_tools.plan import PlanOptions
from data_tools.plan_store import iter_samples


class Killed(BaseException):
    """No error that anybody catches."""


def test_two_interrupted_plans_do_not_mix(tmp_path, monkeypatch):
    """Begun with one seed, then with another, then finished with the first."""
    monkeypatch.setattr(scan, "PART_ROWS", 64)
    monkeypatch.setattr(planner, "CELL_ROWS", 50)
    source = make_corpus(tmp_path / "in", 300)
    save = planner.save_table

    def draft(folder: str, seed: int) -> Draft:
        return Draft(Request((str(source),)), PlanOptions(seed=seed), tmp_path / folder)

    def interrupted(seed: int, partitions: int) -> None:
        made = 0

        def saving(path, *args):
            nonlocal made
            if path.name.startswith("samples-"):
                made += 1
                if made > partitions:
                    raise Killed
            return save(path, *args)

        monkeypatch.setattr(planner, "save_table", saving)
        with pytest.raises(Killed):
            draft("plan", seed).build()
        monkeypatch.setattr(planner, "save_table", save)

    interrupted(1, 2)
    interrupted(2, 3)
    plan = draft("plan", 1).build()
    assert plan == draft("undisturbed", 1).build()
    assert list(iter_samples(tmp_path / "plan")) == list(iter_samples(tmp_path / "undisturbed"))
