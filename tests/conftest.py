"""What all tests share: chance that is seeded, and a log that no test leaves configured.

Hypothesis takes the same examples in every run, and Trio runs tasks that are ready at once in the
same order, so that a run can be repeated. To look for other examples and orders:
`pytest --hypothesis-profile=explore`.
"""

from collections.abc import Iterator

import pytest
import structlog
import trio
from hypothesis import settings

settings.register_profile("default", derandomize=True, deadline=None, database=None)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile("default")


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
