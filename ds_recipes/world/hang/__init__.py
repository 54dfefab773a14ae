"""The hang monitor: which rank no longer comes further, in what, and the end of a run that would wait for it for ever.

`activity`: what a process does and whether it comes further; `limits`: how long that may take; `frames`: where its main
thread is; `judge`: from what all ranks say to a verdict; `stragglers`: who is slow; `courier`: what ranks tell each other;
`watch`: the thread that sees to all of it; `ending`: stacks, kills and words at the end; `nccl`: torch's own watch on GPUs.
"""
