"""What all tests share: chance that is seeded, a log that no test leaves configured, and turns.

Hypothesis takes the same examples in every run, and Trio runs tasks that are ready at once in the
same order, so that a run can be repeated. To look for other examples and orders:
`pytest --hypothesis-profile=explore`.

Each test begins with the same seed, so it does not matter which came before it, or in which worker
of `pytest -n 2` it runs. Real processes take turns: what starts any goes to one worker.
"""

import signal
from collections.abc import Iterator

import pytest
import structlog
import trio
from hypothesis import settings

PROCESSES = {"scenarios", "bench"}  # folders of tests that start any

settings.register_profile("default", derandomize=True, deadline=None, database=None)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    """Workers of xdist ignore Ctrl-C, and so would the processes that tests start there."""
    if hasattr(config, "workerinput"):
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """For `--dist loadgroup`: one scenario after another, beside tests that start nothing."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            if PROCESSES & set(item.path.parts):
                item.add_marker(pytest.mark.xdist_group("processes"))


@pytest.fixture(autouse=True)
def _one_order_of_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trio shuffles tasks that are ready at once, so that nobody relies on their order."""
    if settings.get_current_profile_name() == "default":
        monkeypatch.setattr(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
        trio._core._run._r.seed(0)


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """A test that captured the log has configured structlog for the whole process."""
    yield
    structlog.reset_defaults()
