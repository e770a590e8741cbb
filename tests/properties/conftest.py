"""How properties are searched for counterexamples: the same examples at every start, few enough for the daily round."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "suite",
    max_examples=60,
    derandomize=True,  # a failure is the change's, not the day's
    deadline=None,  # the machine may be busy
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("suite")
