"""HTTP, in the order that a request passes it.

middleware          the steps before and behind every route, in two lists
routes, batch       the routes of every resource
requests, preconditions     parse a request
responses, problems, problem_pages      build a response; every error becomes a problem
edge_leases         edges renew their cache leases
health              /livez, /readyz, /health
"""
