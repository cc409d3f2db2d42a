"""The relay keeps the caches right where the app cannot: SQL from outside, and caches that were out of use.

listener    SQL that another program writes invalidates its paths in both tiers
live        sums up what edges and apps count, for the console's page Live
janitor     readmits Redis, removes edges that are gone, deletes expired idempotency keys and histories

Any number of relays may run. The app's own writes need none.
"""
