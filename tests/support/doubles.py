"""What stands for data, stores, denoisers and students here has what the protocols ask for, as mypy finds in lint."""

from __future__ import annotations

from collections.abc import Sequence

import test_dd1_dd2
import test_device
import test_memory
import test_student
import test_support
import toys
from test_dmd2 import Spy as Dmd2Spy
from test_family import On
from test_hyper_sd import Known
from test_phased_dmd import GaussianCritic
from test_scm import FlowTeacher
from test_siblings import Affine, Guided
from test_siblings import Spy as SiblingsSpy
from test_sid import Spy as SidSpy

from fewstep.cost.blank import Blank
from fewstep.data.batches import Ahead, Batches, Data
from fewstep.data.buckets import Rows
from fewstep.data.pairs import Pairs
from fewstep.data.store import Store
from fewstep.diffusion.denoiser import Denoiser, NetDenoiser, ScheduleView
from fewstep.diffusion.student import Sampler, Student
from fewstep.methods.disback import Target
from fewstep.methods.router import Conditions, RoutedDenoiser, RoutedStudent
from fewstep.teachers.analytic import GaussianMixture
from fewstep.tokens.codes import CodebookDenoiser
from fewstep.tokens.entries import EntryStudent
from fewstep.tokens.students import CausalStudent, Generator, ParallelStudent

DATA: Sequence[type[Data]] = [Batches, Ahead, Blank, test_memory.Counting, test_support.Data]
ROWS: Sequence[type[Rows]] = [Store, Pairs, toys.Rows, test_device.Rows]
CONDITIONS: Sequence[type[Conditions]] = [Store, toys.Rows]
STUDENTS: Sequence[type[Sampler]] = [Student, EntryStudent, RoutedStudent]
DENOISERS: Sequence[type[Denoiser]] = [
    NetDenoiser,
    ScheduleView,
    GaussianMixture,
    RoutedDenoiser,
    Target,
    CodebookDenoiser,
    CausalStudent,
    ParallelStudent,
    Generator,
]
DOUBLES: Sequence[type[Denoiser]] = [
    Affine,
    Dmd2Spy,
    GaussianCritic,
    Known,
    Guided,
    On,
    SiblingsSpy,
    SidSpy,
    FlowTeacher,
    test_student.Recorder,
    test_dd1_dd2.Exact,
    test_dd1_dd2.Spy,
]
