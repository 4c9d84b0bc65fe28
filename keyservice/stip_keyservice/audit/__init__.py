"""The published attacks, run against an instance: how much leaks to whom, as figures.

`knowledge` says who knows what, `view` what such an attacker holds (`network`: models it can run), `claims` what an
attack says it found; `attacks` see these four and nothing else. `truth` opens the instance's secrets and `scoring`
holds claims against it, beside `priors`. `corpus` and `traffic` make what victims said and what a server saw of it;
`matrix` and `run` put it together, `document` and `report` say it.
"""
