def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="more rounds and longer loads in tests/faults, by hand")
