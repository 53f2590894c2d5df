"""What the tests of other processes share."""
import time


def wait_for(condition, seconds: float = 600):
    "The first true value of the condition."
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, f'nothing after {seconds} s'
        time.sleep(0.05)
    return value
