"""What all suites share: cases of the nightly size run under --full alone."""


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the nightly sizes too (marker `full`)")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--full"):
        return
    kept = [item for item in items if item.get_closest_marker("full") is None]
    if len(kept) != len(items):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full") is not None])
        items[:] = kept
