"""Every file here trains on several ranks."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _once_for_all_ranks(deepspeed_imported: None) -> None:
    """See `deepspeed_imported`."""
