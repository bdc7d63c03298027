"""The mathematics: schedules, denoisers, students, times, solvers, losses; functions of tensors."""
