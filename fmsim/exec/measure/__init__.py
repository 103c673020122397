"""What takes how long on this GPU: clocks, kernel cases, and the calibration that makes a hardware
preset.
"""
