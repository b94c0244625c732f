"""The shell of moerator: it observes, asks the brain, applies and reports. It decides nothing."""
