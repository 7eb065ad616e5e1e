from hypothesis import settings

# timings vary too much for deadlines; the examples are the same in every run, so that a red test is red for everybody
settings.register_profile("cenote", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("cenote")
