"""Which tests run in the same process of pytest-xdist, and in which order.

Tests of one file stay together, for its fixtures. Files whose tests use the same running service
stay together too, so that each service is started once.
"""

from pathlib import PurePosixPath
from typing import Any

GROUPS = {
    "service": (
        "test_http", "test_decodes", "test_client", "test_webhook", "test_observed", "test_demo",
        "test_supervisor", "test_page", "test_hostile_page", "test_queue_cli", "test_typescript",
        "test_client_wheel",
    ),
    "guarded": ("test_guarded", "test_schema", "test_remote_cli", "test_queue_page"),
}  # fmt: skip
"""Session fixtures that start services, and the files in tests/e2e that use them."""
FIRST = (
    *GROUPS, "tests/chaos/", "tests/e2e/", "tests/unit/test_train", "tests/integration/",
    "tests/fuzz/",
)  # fmt: skip
"""The groups that take longest begin first, so that the last process to end does not end late."""


def group_of(nodeid: str) -> str:
    """The name of a shared service, else the test's file."""
    file = nodeid.partition("::")[0]
    if "tests/e2e/" in file:
        for group, names in GROUPS.items():
            if PurePosixPath(file).stem in names:
                return group
    return file


def rank(nodeid: str) -> int:
    """The place of the test's group in the order of all groups."""
    group = group_of(nodeid)
    return next((i for i, prefix in enumerate(FIRST) if group.startswith(prefix)), len(FIRST))


def scheduler(config: Any, log: Any) -> Any:
    """A scheduler that hands out whole groups, in the order of collection."""
    from xdist.scheduler import LoadScopeScheduling

    # `--dist loadgroup` of xdist 3.8 ignores its marks with pytest 9.2
    class GroupScheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return GroupScheduling(config, log)
