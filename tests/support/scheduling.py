"""Which tests run in the same process of pytest-xdist, and in which order.

Tests of one file stay together, for its fixtures. Files that need the same running service, or the
same package whose import takes seconds, stay together too, so that each process starts or imports
only some of them.
"""

from typing import Any

GROUPS = {
    "page": ("e2e/test_page", "e2e/test_hostile_page"),
    "service": tuple(
        f"e2e/test_{name}"
        for name in (
            "http", "decodes", "client", "webhook", "observed", "demo", "supervisor", "queue_cli",
            "typescript", "client_wheel",
        )
    ),
    "compressai": (
        "e2e/test_weights_cli",
        *(
            f"unit/test_{name}"
            for name in (
                "architectures", "codec", "context", "networks", "recovery", "tables", "zoo",
            )
        ),
    ),
    "guarded": tuple(
        f"e2e/test_{name}" for name in ("guarded", "schema", "remote_cli", "queue_page")
    ),
    "evaluate": tuple(f"unit/test_{name}" for name in ("evaluate", "metrics", "train_losses")),
}  # fmt: skip
"""Files that share what takes seconds: the service of a session fixture (`page` and `service` use
the same fixture, `guarded` another), or the import of CompressAI, or of the packages that measure
quality."""
FIRST = (
    *GROUPS, "tests/chaos/", "tests/e2e/", "tests/unit/test_train", "tests/integration/",
    "tests/fuzz/",
)  # fmt: skip
"""The groups that take longest begin first, so that the last process to end does not end late."""


def group_of(nodeid: str) -> str:
    """The name of the group that the test's file belongs to, else the file."""
    file = nodeid.partition("::")[0]
    name = file.rpartition("tests/")[2].removesuffix(".py")
    return next((group for group, names in GROUPS.items() if name in names), file)


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
