"""A pytest plugin (`-p benchmarks.device_tests`): keep one implementation's tests, or the device's."""

import pytest

DEVICE = "device"  # the tests of the public functions, which take the fixture of that name


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("device tests")
    group.addoption(
        "--implementation", help=f'name of an "impl" parameter, or "{DEVICE}" for tests of the public functions'
    )
    group.addoption("--every", type=int, default=1, help="keep every n-th of them: a rehearsal, not a proof")


def _belongs(item: pytest.Item, implementation: str) -> bool:
    fixtures = getattr(item, "fixturenames", ())
    if implementation == DEVICE:
        return DEVICE in fixtures and "impl" not in fixtures
    return "impl" in fixtures and item.callspec.params["impl"].name == implementation


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    implementation = config.getoption("--implementation")
    if implementation is None:
        return
    kept = [item for item in items if _belongs(item, implementation)][:: config.getoption("--every")]
    dropped = set(items) - set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item in dropped])
    items[:] = kept
