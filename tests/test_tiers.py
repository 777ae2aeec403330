"""The everyday tier leaves nothing out for good."""

from tiers import EVERYDAY_SHARES, everyday


def test_a_family_with_a_share_is_run_through_in_time():
    assert 0 in EVERYDAY_SHARES.values()  # such a family is for make proof alone
    names = [f"tests/cuda/test_planted_bugs.py::test_a_planted_bug_is_caught[{n}]" for n in range(100)]
    days = [{name for name in names if everyday(name, day)} for day in range(200)]
    assert all(len(chosen) < 30 for chosen in days)
    assert set().union(*days) == set(names)
    assert everyday("tests/test_operator.py::test_as_exact_as_eager", 0)
