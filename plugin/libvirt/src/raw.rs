//! The libvirt calls that `virt` lacks or gets wrong, over `virt-sys`.
//!
//! `virDomainAbortJob` and `virDomainMigrateStartPostCopy` are not bound; `job_stats` panics on an unexpected type and frees
//! libvirt's memory with Rust's allocator; `migrate_to_uri3` panics on a NUL byte.
//! Owns all `unsafe` of this crate. Must not interpret what it reads.

use std::ffi::{CStr, CString, c_char, c_int, c_uint};
use std::ptr;

use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error;
use virt_sys as sys;

/// One typed parameter's value. Types without a number or text are left out.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum TypedValue {
    Integer(i64),
    Unsigned(u64),
    Double(f64),
    Boolean(bool),
    Text(String),
}

/// Frees libvirt's array of typed parameters.
struct Params {
    array: sys::virTypedParameterPtr,
    len: c_int,
}

impl Drop for Params {
    fn drop(&mut self) {
        if !self.array.is_null() {
            // SAFETY: array and len are as libvirt handed them out, and freed once only.
            unsafe { sys::virTypedParamsFree(self.array, self.len) };
        }
    }
}

/// `virDomainAbortJob`: cancels the migration that runs on `domain`.
pub(crate) fn abort_job(domain: &Domain) -> Result<(), Error> {
    // SAFETY: `domain` holds a reference on the pointer for the whole call.
    let status = unsafe { sys::virDomainAbortJob(domain.as_ptr()) };
    check(status)
}

/// `virDomainMigrateStartPostCopy`: switches the migration that runs on `domain` to post-copy.
pub(crate) fn start_post_copy(domain: &Domain) -> Result<(), Error> {
    // SAFETY: `domain` holds a reference on the pointer for the whole call.
    let status = unsafe { sys::virDomainMigrateStartPostCopy(domain.as_ptr(), 0) };
    check(status)
}

/// Which QEMU a question about a host means: all as in a domain's XML.
pub(crate) struct Emulation<'a> {
    /// The host's own choice if it is not said.
    pub(crate) emulator: Option<&'a CStr>,
    pub(crate) arch: &'a CStr,
    pub(crate) machine: &'a CStr,
    pub(crate) virt_type: &'a CStr,
}

impl Emulation<'_> {
    fn emulator(&self) -> *const c_char {
        self.emulator.map_or(ptr::null(), CStr::as_ptr)
    }
}

/// `virConnectCompareHypervisorCPU`; a processor that the host lacks is an error that says what is missing.
pub(crate) fn compare_cpu(
    connect: &Connect,
    what: &Emulation<'_>,
    cpu_xml: &CStr,
) -> Result<(), Error> {
    // SAFETY: the strings and the connection live across the call.
    let status = unsafe {
        sys::virConnectCompareHypervisorCPU(
            connect.as_ptr(),
            what.emulator(),
            what.arch.as_ptr(),
            what.machine.as_ptr(),
            what.virt_type.as_ptr(),
            cpu_xml.as_ptr(),
            sys::VIR_CONNECT_COMPARE_CPU_FAIL_INCOMPATIBLE as c_uint,
        )
    };
    check(status)
}

/// One parameter of a migration, by libvirt's name for it.
pub(crate) enum MigrateParam<'a> {
    Text(&'static CStr, &'a CStr),
    Number(&'static CStr, u64),
    Integer(&'static CStr, c_int),
}

/// `virDomainMigrateToURI3` with these parameters. Blocks to the end.
pub(crate) fn migrate_to_uri(
    domain: &Domain,
    destination: &CStr,
    with: &[MigrateParam<'_>],
    flags: u32,
) -> Result<(), Error> {
    let mut params = Params {
        array: ptr::null_mut(),
        len: 0,
    };
    let mut capacity: c_int = 0;
    for param in with {
        let (array, len) = (&mut params.array, &mut params.len);
        // SAFETY: the three out pointers live across the call; libvirt copies both strings, and
        // numbers are passed by value.
        let status = unsafe {
            match *param {
                MigrateParam::Text(name, text) => sys::virTypedParamsAddString(
                    array,
                    len,
                    &mut capacity,
                    name.as_ptr(),
                    text.as_ptr(),
                ),
                MigrateParam::Number(name, number) => {
                    sys::virTypedParamsAddULLong(array, len, &mut capacity, name.as_ptr(), number)
                }
                MigrateParam::Integer(name, number) => {
                    sys::virTypedParamsAddInt(array, len, &mut capacity, name.as_ptr(), number)
                }
            }
        };
        check(status)?;
    }
    // SAFETY: `domain` and `params` outlive the call, which only reads the parameters.
    let status = unsafe {
        sys::virDomainMigrateToURI3(
            domain.as_ptr(),
            destination.as_ptr(),
            params.array,
            params.len as c_uint,
            flags as c_uint,
        )
    };
    check(status)
}

/// `virDomainGetJobStats`: the job's type and every parameter libvirt gave.
pub(crate) fn job_stats(
    domain: &Domain,
    flags: u32,
) -> Result<(i32, Vec<(String, TypedValue)>), Error> {
    let mut kind: c_int = 0;
    let mut params = Params {
        array: ptr::null_mut(),
        len: 0,
    };
    // SAFETY: the out pointers live across the call; `domain` holds its reference.
    let status = unsafe {
        sys::virDomainGetJobStats(
            domain.as_ptr(),
            &mut kind,
            &mut params.array,
            &mut params.len,
            flags as c_uint,
        )
    };
    check(status)?;
    if params.array.is_null() {
        return Ok((kind, Vec::new()));
    }
    let len = usize::try_from(params.len).unwrap_or(0);
    // SAFETY: libvirt allocated `len` parameters at `array`; `params` frees them afterwards.
    let array = unsafe { std::slice::from_raw_parts(params.array, len) };
    Ok((kind, array.iter().filter_map(read_param).collect()))
}

fn read_param(param: &sys::virTypedParameter) -> Option<(String, TypedValue)> {
    let name: Vec<u8> = param
        .field
        .iter()
        .take_while(|byte| **byte != 0)
        .map(|byte| *byte as u8)
        .collect();
    let name = String::from_utf8(name).ok()?;
    // SAFETY: `type_` says which member of the union libvirt wrote; unknown types are not read.
    let value = unsafe {
        match param.type_ as c_uint {
            sys::VIR_TYPED_PARAM_INT => TypedValue::Integer(param.value.i.into()),
            sys::VIR_TYPED_PARAM_UINT => TypedValue::Unsigned(param.value.ui.into()),
            sys::VIR_TYPED_PARAM_LLONG => TypedValue::Integer(param.value.l),
            sys::VIR_TYPED_PARAM_ULLONG => TypedValue::Unsigned(param.value.ul),
            sys::VIR_TYPED_PARAM_DOUBLE => TypedValue::Double(param.value.d),
            sys::VIR_TYPED_PARAM_BOOLEAN => TypedValue::Boolean(param.value.b != 0),
            sys::VIR_TYPED_PARAM_STRING => TypedValue::Text(read_text(param.value.s)?),
            _ => return None,
        }
    };
    Some((name, value))
}

/// # Safety
/// `text` is null or a NUL-terminated string that lives across the call.
unsafe fn read_text(text: *const c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: not null, and terminated as the caller promises.
    Some(
        unsafe { CStr::from_ptr(text) }
            .to_string_lossy()
            .into_owned(),
    )
}

fn check(status: c_int) -> Result<(), Error> {
    if status < 0 {
        Err(Error::last_error())
    } else {
        Ok(())
    }
}

/// A C string, or the name of the argument that cannot be one.
pub(crate) fn c_string(
    what: &'static str,
    text: &str,
) -> Result<CString, crate::error::LibvirtError> {
    CString::new(text).map_err(|_| crate::error::LibvirtError::Nul { what })
}
