//! A guard of the calling thread's floating-point control register.
//!
//! An engine may run its threads with flush-to-zero, another rounding or traps. The library's numbers assume IEEE defaults,
//! and the engine must find its own settings, exception flags included, afterwards.

use std::marker::PhantomData;

/// While alive, the calling thread rounds to nearest and keeps subnormals; dropping restores what was found.
/// Not `Send`: the register belongs to the thread.
#[derive(Debug)]
#[must_use = "the state is restored when the guard drops"]
pub struct FloatState {
    saved: register::State,
    thread: PhantomData<*const ()>,
}

impl FloatState {
    /// Saves the thread's state and sets the default.
    pub fn enter() -> FloatState {
        let saved = register::get();
        register::set(register::DEFAULT);
        FloatState { saved, thread: PhantomData }
    }
}

impl Drop for FloatState {
    fn drop(&mut self) {
        register::set(self.saved);
    }
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
mod register {
    use std::arch::asm;

    /// MXCSR.
    pub type State = u32;
    /// Round to nearest, all exceptions masked, no FTZ, no DAZ.
    pub const DEFAULT: State = 0x1f80;

    pub fn get() -> State {
        let mut value = 0u32;
        // SAFETY: stores the 32 bits of MXCSR to a local, and changes neither stack nor flags.
        unsafe { asm!("stmxcsr [{}]", in(reg) &mut value, options(nostack, preserves_flags)) };
        value
    }

    pub fn set(value: State) {
        // SAFETY: reads 32 bits from a local. The value is the default or one that `get` returned, so that no reserved bit is
        // set, which would fault.
        unsafe { asm!("ldmxcsr [{}]", in(reg) &value, options(nostack, preserves_flags)) };
    }
}

#[cfg(all(target_arch = "aarch64", not(miri)))]
mod register {
    use std::arch::asm;

    /// FPCR and FPSR.
    pub type State = (u64, u64);
    /// Round to nearest, no exception traps, no flush to zero, no default NaN.
    pub const DEFAULT: State = (0, 0);

    pub fn get() -> State {
        let (control, status): (u64, u64);
        // SAFETY: copies two registers of the thread, and touches no memory, stack or flags.
        unsafe { asm!("mrs {}, fpcr", "mrs {}, fpsr", out(reg) control, out(reg) status, options(nomem, nostack)) };
        (control, status)
    }

    pub fn set((control, status): State) {
        // SAFETY: writes two registers of the thread, with the default or what `get` returned; touches no memory or stack.
        unsafe { asm!("msr fpcr, {}", "msr fpsr, {}", in(reg) control, in(reg) status, options(nomem, nostack)) };
    }
}

// Miri runs no assembly, and knows the default state only.
#[cfg(any(miri, not(any(target_arch = "x86_64", target_arch = "aarch64"))))]
mod register {
    pub type State = ();
    pub const DEFAULT: State = ();
    pub fn get() -> State {}
    pub fn set(_: State) {}
}

#[cfg(all(test, not(miri), any(target_arch = "x86_64", target_arch = "aarch64")))]
mod tests {
    use super::*;
    use std::hint::black_box;

    #[cfg(target_arch = "x86_64")]
    const FLUSH: register::State = 0x1f80 | 0x8040;
    #[cfg(target_arch = "aarch64")]
    const FLUSH: register::State = (1 << 24, 0);

    #[test]
    fn subnormals_live_inside_and_the_found_state_comes_back() {
        let before = register::get();
        register::set(FLUSH);
        let flushed = black_box(f32::MIN_POSITIVE) * black_box(0.5);
        let guard = FloatState::enter();
        let kept = black_box(f32::MIN_POSITIVE) * black_box(0.5);
        drop(guard);
        let after = register::get();
        register::set(before);
        assert_eq!((flushed, kept.is_subnormal()), (0.0, true));
        // The product that flushed raised exception flags before the guard; they are the thread's own.
        #[cfg(target_arch = "x86_64")]
        assert_eq!(after & !0x3f, FLUSH);
        #[cfg(target_arch = "aarch64")]
        assert_eq!(after.0, FLUSH.0);
    }
}
