"""What would it cost, before a chip is booked. No torch. The files in reading order:

architecture, models       a model's FLOPs and bytes; models by name           catalogue       chips by name
job, layout                what is to be run, and every way to split it        ask, speed      a question, a measured speed in words
cost, schedule, memory     the physics of a training step                      goodput         failures
serving                    the physics of prefill and decode                   mlperf          what MLPerf's tables do not print
regress, run_features      published runs nearest to a job correct the physics forecast, serving_forecast  the corrected physics
answer, service_price      everything about a training run, about a service    options         a recipe's own pools
measured, probe            what qualify and this machine say of a chip         anchor          the user's own measured runs
render, page, pools_page   the answer seen                                     figures         figures in words
runs_table, serving_table  rows of published tables as jobs and as services    score           how wrong it all is
fit, fit_serving, sizes    the script that sets every fitted constant
"""
