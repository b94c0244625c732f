"""The pure brain of moerator: facts and a wish in, actions, conditions and reasons out.

No clock, randomness, logging, environment or I/O lives here; shells observe, apply and report.
"""
