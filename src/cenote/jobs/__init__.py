"""What cenote finds out for a person: one folder a job, with the same file names in each.

`job.py` what it does, `arms.py` what is compared, `measure.py` the metrics, `result.py` what comes out.
"""
